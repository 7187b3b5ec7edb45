"""Answers with what the message was, as a script of pymilter."""

import Milter
from chaos_answers import Seen, refused_recipient


class Chaos(Milter.Base):
    def envfrom(self, sender, *params):
        self.seen = Seen(sender)
        return Milter.CONTINUE

    def envrcpt(self, recipient, *params):
        words = refused_recipient(recipient)
        if words:
            self.setreply("550", "5.1.1", words)
            return Milter.REJECT
        self.seen.address(recipient)
        return Milter.CONTINUE

    def header(self, name, value):
        self.seen.field(name, value)
        return Milter.CONTINUE

    def body(self, chunk):
        self.seen.body(chunk)
        return Milter.CONTINUE

    def eom(self):
        if self.seen.refusal:
            self.setreply("550", "5.7.1", self.seen.refusal)
            return Milter.REJECT
        self.addheader("X-Pymilter", self.seen.mark)
        if self.seen.recipient:
            self.addrcpt(self.seen.recipient)
        if self.seen.new_body:
            self.replacebody(self.seen.new_body)
        return Milter.CONTINUE


Milter.factory = Chaos
Milter.set_flags(Milter.ADDHDRS | Milter.ADDRCPT | Milter.CHGBODY)
Milter.runmilter("chaos", "unix:/nowhere", 60)
