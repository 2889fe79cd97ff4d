"""Windows of dialogues that are longer than the context: whole turns behind the system message.

    windows, counts = chat_windows(tokens, starts, tok, context=256)
    ids, first = window_ids(tokens, windows[0])    # the answers from index `first` on are trained

A turn is what comes after an answer, up to the end of the next answer. Every answer is a target in
exactly one window. What precedes the first target is, where the dialogue has it and the answer
leaves the room, a third of the context: older turns, which are not trained again.
"""
from bisect import bisect_right
from collections import Counter

import numpy as np

ROLES = SYSTEM, ASSISTANT, *_ = "system", "assistant", "user", "tool"
MIN_QUESTION = 16  # tokens that a system message leaves, within a third of the context


def chat_windows(tokens, starts, tok, context):
    """Return (windows, Counter of what had to be cut or left out).

    tokens (n,), starts (dialogues + 1,) -> windows (n_windows, 7) int64, in the dialogues' order.
    A row holds the ends of three slices of tokens, which concatenated are the window's at most
    context + 1 ids, and the index in it of the first target: the system message (none where the
    window is the beginning of a dialogue), the header of a message that is cut at its start, the
    rest. Nothing is trained before that index, and an answer that is cut has no end token.
    """
    begins, contents, ends, roles = find_messages(tokens, tok)
    firsts = np.searchsorted(begins, starts)
    rows, counts = [], Counter()
    for a, b, i, j in zip(*(x.tolist() for x in (starts[:-1], starts[1:], firsts, firsts[1:]))):
        if b - a <= context + 1:
            rows.append((a, a, a, a, a, b, 0))
        else:
            messages = [x[i:j].tolist() for x in (begins, contents, ends, roles)]
            rows += split_dialogue(a, b, *messages, context, counts)
    return np.array(rows, np.int64).reshape(-1, 7), counts


def window_ids(tokens, window):
    """Return (ids (n,) int64, index of the first target) of a row of chat_windows."""
    *ends, first = window.tolist()
    slices = [tokens[a:b] for a, b in zip(ends[::2], ends[1::2]) if a < b]
    return np.concatenate(slices).astype(np.int64), first


def begins_dialogue(window):
    """Return whether a row of chat_windows begins with its dialogue's first token, uncut."""
    return window[0] == window[4]


def find_messages(tokens, tok):
    """Return the positions in ChatML ids of each message's first token, of its first token after
    the header, and after its last token (<|im_end|>), and its role or ""."""
    begins = np.flatnonzero(tokens == tok.im_start)
    ends = np.append(np.flatnonzero(tokens == tok.im_end) + 1, len(tokens))
    contents, roles = begins + 1, np.full(len(begins), "", "<U9")
    for role in ROLES:
        header = tok.role_header(role)
        at = begins[:, None] + np.arange(len(header))            # (messages, ids of the header)
        same = (tokens[np.minimum(at, len(tokens) - 1)] == header).all(1)
        contents[same], roles[same] = begins[same] + len(header), role
    return begins, contents, ends[np.searchsorted(ends, begins)], roles


def split_dialogue(begin, end, begins, contents, ends, roles, context, counts):
    """Return the windows of the dialogue tokens[begin:end], as rows of chat_windows.

    begins, contents, ends, roles: lists, an item for each message, as find_messages gives them.
    """
    size, third = context + 1, -(-context // 3)                  # ids of a window; before a target
    n_system = begins[1] - begin if roles[:1] == [SYSTEM] and len(begins) > 1 else 0
    if n_system + MIN_QUESTION > third:  # an ordinary message of the first turn
        counts["system messages too long to be repeated"] += 1
        n_system = 0
    answers = [m for m, role in enumerate(roles) if role == ASSISTANT]
    turns = [begin + n_system, *(begins[m + 1] for m in answers[:-1])]
    if not answers:
        counts["dialogues without an answer"] += 1
    rows, i = [], 0
    while i < len(answers):
        target, length = contents[answers[i]], ends[answers[i]] - contents[answers[i]]
        own = n_system + target - turns[i]                       # ids before it in its own turn
        limit = max(size - length, min(own, third))              # the answer before older turns
        wanted = limit if own > limit else min(third, limit)
        earliest = target - (wanted - n_system)
        start = header_end = rest = turns[bisect_right(turns, earliest, 1, i + 1) - 1]
        if n_system + target - start > limit:                    # a whole turn is too long
            m = bisect_right(begins, earliest, 0, answers[i] + 1) - 1
            start, header_end = begins[m], contents[m]           # cut this message at its start
            rest = min(header_end + earliest - start, ends[m] - 1)
            if n_system + header_end - start + target - rest > limit and m < answers[i]:
                start = header_end = rest = begins[m + 1]        # its header alone is too long
            counts["questions cut at their start"] += own > limit
        before = n_system + header_end - start + target - rest
        room, i = size - before, i + 1
        counts["answers cut at their end"] += 0 < room < length
        if rest >= target or room < 1:
            counts["answers that do not fit at all"] += 1
            continue
        stop = target + min(room, length)
        while room >= length and i < len(answers) and ends[answers[i]] - target <= room:
            stop, i = ends[answers[i]], i + 1
        if i == len(answers) and end - target <= room and room >= length:
            stop = end
        if start == begin + n_system and rest == header_end == start:  # the dialogue's beginning
            rows.append((begin, begin, begin, begin, begin, stop, before))
        else:
            rows.append((begin, begin + n_system, start, header_end, rest, stop, before))
    return rows
