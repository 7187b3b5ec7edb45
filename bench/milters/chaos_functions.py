"""Answers with what the message was, as functions."""

from chaos_answers import Seen, refused_recipient

from sharded_milter import Accept, AddHeader, AddRecipient, Milter, Reject, ReplaceBody

milter = Milter("functions")


@milter.rcpt(light=True)
def rcpt(recipient, envelope):
    words = refused_recipient(recipient.raw)
    return Reject(words, xcode="5.1.1") if words else None


@milter.eom
def eom(message):
    seen = Seen(message.sender.raw)
    for recipient in message.recipients:
        seen.address(recipient.raw)
    for header in message.headers:
        seen.field(header.name, header.value)
    seen.body(message.body)
    if seen.refusal:
        return Reject(seen.refusal, xcode="5.7.1")
    actions = [AddHeader("X-Functions", seen.mark)]
    if seen.recipient:
        actions.append(AddRecipient(seen.recipient))
    if seen.new_body:
        actions.append(ReplaceBody(seen.new_body))
    return Accept(*actions)
