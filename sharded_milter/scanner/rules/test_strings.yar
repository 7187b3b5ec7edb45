// Strings that exist to be found. They are spelt in hex so that nothing finds them here.

rule eicar {
    meta:
        description = "the EICAR anti-malware test file"
        action = "reject"
    strings:
        $eicar = {
            58 35 4F 21 50 25 40 41 50 5B 34 5C 50 5A 58 35 34 28 50 5E 29 37 43 43 29 37 7D 24
            45 49 43 41 52 2D 53 54 41 4E 44 41 52 44 2D 41 4E 54 49 56 49 52 55 53 2D
            54 45 53 54 2D 46 49 4C 45 21 24 48 2B 48 2A
        }
    condition:
        $eicar
}

rule gtube {
    meta:
        description = "the Generic Test for Unsolicited Bulk Email, in any text encoding"
        action = "reject"
    strings:
        $gtube = "\x58\x4A\x53\x2A\x43\x34\x4A\x44\x42\x51\x41\x44\x4E\x31\x2E\x4E\x53\x42\x4E\x33\x2A\x32\x49\x44\x4E\x45\x4E\x2A\x47\x54\x55\x42\x45\x2D\x53\x54\x41\x4E\x44\x41\x52\x44\x2D\x41\x4E\x54\x49\x2D\x55\x42\x45\x2D\x54\x45\x53\x54\x2D\x45\x4D\x41\x49\x4C\x2A\x43\x2E\x33\x34\x58" ascii wide
    condition:
        $gtube
}
