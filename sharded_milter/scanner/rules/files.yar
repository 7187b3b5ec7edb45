// Attachments that run, or pretend not to. `filename` is the name in the mail or in the archive.

rule executable {
    meta:
        description = "a program for Windows, Linux, macOS or Java, or a Windows shortcut"
        action = "quarantine"
    strings:
        $shortcut = { 4C 00 00 00 01 14 02 00 00 00 00 00 C0 00 00 00 00 00 00 46 }
    condition:
        // MZ alone is not enough: a text may start with these letters.
        (uint16(0) == 0x5A4D and (
            uint32(uint32(0x3C)) == 0x00004550 or
            uint16(uint32(0x3C)) == 0x454E or
            uint16(uint32(0x3C)) == 0x454C or
            uint16(uint32(0x3C)) == 0x584C
        )) or
        uint32be(0) == 0x7F454C46 or
        // Mach-O, 32 and 64 bits, both byte orders
        uint32be(0) == 0xFEEDFACE or uint32be(0) == 0xFEEDFACF or
        uint32be(0) == 0xCEFAEDFE or uint32be(0) == 0xCFFAEDFE or
        // a fat Mach-O has a few architectures; a Java class has a major version from 45 up
        (uint32be(0) == 0xCAFEBABE and (
            (uint32be(4) > 0 and uint32be(4) < 20) or
            (uint16be(6) >= 45 and uint16be(6) < 120)
        )) or
        $shortcut at 0
}

rule double_extension {
    meta:
        description = "a name that shows a harmless extension before, or instead of, the one that runs"
        action = "quarantine"
    condition:
        filename matches /\.(pdf|docx?|xlsx?|pptx?|odt|ods|rtf|txt|csv|html?|jpe?g|png|gif|bmp|tiff?|svg|mp3|mp4|avi|mov|wav|zip|rar|7z|eml|msg)[\s_]*\.(exe|scr|com|pif|bat|cmd|js|jse|vbs|vbe|wsf|wsh|hta|lnk|msi|msp|ps1|cpl|jar|reg|scf|dll|chm|iso|img|vhdx?)[\s.]*$/i or
        // U+202E turns what follows around: "invoice\u202Efdp.exe" is shown as "invoiceexe.pdf"
        filename contains "\xE2\x80\xAE"
}
