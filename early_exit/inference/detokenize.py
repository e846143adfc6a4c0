"""Which text each token adds: what streaming prints and what token colouring colours."""

from collections.abc import Sequence


def pieces(tokenizer, token_ids: Sequence[int], *, complete: bool = True) -> list[str]:
    """The text that each token adds; joined, they are the decoded text without special tokens.

    A character that spans several tokens belongs to the token that completes it; the tokens
    before it, and special tokens, add "".

    Args:
      complete: whether no token follows. If some may, a character not yet complete is held back
        instead of becoming "�", so the pieces so far never change as tokens are added.
    """

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    ids = [int(token) for token in token_ids]
    added = []
    # Decoding only [context, …) costs the same at any length. [context, start) has been given
    # out already: decoders treat a text's first word differently, so a word stands in front.
    context = start = 0
    before = text = ""
    for i in range(len(ids)):
        text = decode(ids[context : i + 1])
        if text == before or text.endswith("�"):
            added.append("")
            continue
        added.append(text[len(before) :])
        context, start = start, i + 1
        before = text = decode(ids[context:start])
    if added and complete:
        added[-1] += text[len(before) :]
    return added
