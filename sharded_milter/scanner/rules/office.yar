// Office documents that carry code.

rule office_macro {
    meta:
        description = "an Office document with macros"
        action = "tag"
    strings:
        // names in the directory of an OLE file, which is UTF-16
        $vba = "_VBA_PROJECT" wide
        $xls_vba = "_VBA_PROJECT_CUR" wide
        // a compressed VBA module starts with its attributes
        $module = { 00 41 74 74 72 69 62 75 74 00 65 20 56 42 5F }
    condition:
        (uint32be(0) == 0xD0CF11E0 and uint32be(4) == 0xA1B11AE1 and any of them) or
        // a document since 2007 is a zip; its macros are one member, or sheets of the older kind
        (archive_depth > 0 and (
            filename iendswith "vbaProject.bin" or
            filename icontains "xl/macrosheets/"
        ))
}
