"""Answers with what the message was, as classes in libmilter's style."""

from chaos_answers import Seen, refused_recipient

from sharded_milter.embedded import Milter


class Plain(Milter):
    """Lives in one worker from connect to close."""

    field = "X-Plain"
    changes_more = True

    def xxfi_envfrom(self, argv):
        self.seen = Seen(argv[0])
        return self.ReturnCodes.CONTINUE

    def xxfi_envrcpt(self, argv):
        words = refused_recipient(argv[0])
        if words:
            self.smfi_setreply("550", "5.1.1", words)
            return self.ReturnCodes.REJECT
        self.seen.address(argv[0])
        return self.ReturnCodes.CONTINUE

    def xxfi_header(self, name, value):
        self.seen.field(name, value)
        return self.ReturnCodes.CONTINUE

    def xxfi_body(self, chunk):
        self.seen.body(chunk)
        return self.ReturnCodes.CONTINUE

    def xxfi_eom(self):
        if self.seen.refusal:
            self.smfi_setreply("550", "5.7.1", self.seen.refusal)
            return self.ReturnCodes.REJECT
        self.smfi_addheader(self.field, self.seen.mark)
        if self.changes_more and self.seen.recipient:
            self.smfi_addrcpt(self.seen.recipient)
        if self.changes_more and self.seen.new_body:
            self.smfi_replacebody(self.seen.new_body)
        return self.ReturnCodes.CONTINUE


class Replayable(Plain):
    """May be rebuilt in another worker."""

    field = "X-Replayable"
    replayable = True


class Second(Replayable):
    """Stands beside a milter that makes the other changes."""

    field = "X-Second"
    changes_more = False
