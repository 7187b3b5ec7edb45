// Archives that cannot be looked into. `encrypted`, `bomb`, `broken`, `flooded` and `timed_out` are
// what the scanner noticed while it opened them; RAR and 7-Zip it does not open.

rule encrypted_archive {
    meta:
        description = "an archive with a member that needs a password"
        action = "tag"
    strings:
        // the method 06 F1 07 01 (AES-256 with SHA-256), after the byte that says: four bytes of name, properties follow
        $seven_zip_aes = { 24 06 F1 07 01 }
    condition:
        encrypted or
        (uint32be(0) == 0x377ABCAF and uint16be(4) == 0x271C and $seven_zip_aes) or
        // RAR 1.5 to 4: headers encrypted (flag of the main header), or the first file (flag of its header)
        (uint32be(0) == 0x52617221 and uint32be(3) == 0x211A0700 and (
            uint16(10) & 0x0080 != 0 or
            (uint8(22) == 0x74 and uint16(23) & 0x0004 != 0)
        )) or
        // RAR 5: the first header is an encryption header
        (uint32be(0) == 0x52617221 and uint32be(4) == 0x1A070100 and uint8(13) == 0x04)
}

rule archive_bomb {
    meta:
        description = "an archive with more data, members or levels than the scanner opens"
        action = "quarantine"
    condition:
        bomb
}

rule archive_broken {
    meta:
        description = "an archive that could not be read to its end; what could be read was matched"
        action = "tag"
    condition:
        broken
}

rule mime_bomb {
    meta:
        description = "a message with more MIME parts or levels than the scanner opens"
        action = "quarantine"
    condition:
        flooded
}

rule scan_timeout {
    meta:
        description = "a message that could not be matched in time"
        action = "quarantine"
    condition:
        timed_out
}
