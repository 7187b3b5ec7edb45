"""Stands in for py3dns: pyspf asks it, and every answer is in this file.

It lies first on the search path of the process under test, which then needs no network and says
the same each time. pyspf asks for TXT records, with fallback to the type SPF.
"""

# mypy: ignore-errors

RECORDS = {
    ("pass.example", "TXT"): [[b"v=spf1 ip4:127.0.0.0/8 -all"]],
    ("fail.example", "TXT"): [[b"v=spf1 ip4:192.0.2.1 -all"]],
    ("softfail.example", "TXT"): [[b"v=spf1 ~all"]],
    ("broken.example", "TXT"): [[b"v=spf1 nonsense:1 -all"]],
}


class DNSError(Exception):
    """What py3dns raises when nobody answers."""


class Type:
    SPF = 99


class Answer:
    def __init__(self, records):
        self.header = {"tc": False, "rcode": 0, "status": "NOERROR"}
        self.answers = records
        self.additional = []


class DnsRequest:
    def __init__(self, name, qtype, **options):
        self.name, self.qtype = name, qtype

    def req(self):
        if self.name.endswith("silent.example"):
            raise DNSError("no working name servers discovered")
        found = RECORDS.get((self.name.rstrip("."), self.qtype), [])
        return Answer([{"name": self.name, "typename": self.qtype, "data": data} for data in found])


def DiscoverNameServers():
    """The machine's configuration is of no concern."""
