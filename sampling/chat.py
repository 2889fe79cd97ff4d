"""A conversation with a model, in the terminal or through a pipe."""
import difflib
import json
import os
import re
import sys
from contextlib import suppress

from common.command_line import UserError
from common.files import write_file
from common.settings import check_range
from gpt import KVCache
from models.folders import RANGES, check_chat_tokens
from sampling.text import generate_text, last_part, print_stream, printable

HELP = """/new            start a new conversation
/system TEXT    set the system message, and start a new conversation
/temperature X  0 = always the most likely token; higher values vary more
/save FILE      write the conversation as a line of JSON, as prepare.py chat reads it
/quit           end; Ctrl-C stops an answer"""
USAGE = {line[1:].split()[0]: line for line in HELP.splitlines()}  # {command: its line of HELP}


class Chat:
    """A conversation: its messages, and the key-value cache of what the model has read of them."""

    def __init__(self, model, tok, cfg):
        self.model, self.tok, self.cfg = model, tok, cfg
        check_chat_tokens(model, tok)
        self.cache = KVCache(len(model.blocks), model.config.block_size)
        self.begin(cfg.system)

    def begin(self, system):
        """Start a new conversation with this system message; "" = none."""
        self.system, self.messages, self.turn = system, [], 0
        self.system_messages = [dict(role="system", content=system)] if system else []

    def ask(self, question):
        """Yield the answer piece by piece. Question and answer join the messages; an answer that is
        interrupted joins as far as it was yielded.

        UserError: the question does not fit the context; the messages are unchanged.
        """
        ids, answer = self.prompt(question), ""
        self.messages.append(dict(role="user", content=question))
        try:
            for piece in generate_text(self.model, self.tok, ids, self.cfg,
                                       self.cfg.seed + self.turn, self.cache):
                answer += piece
                yield piece
        finally:
            self.messages.append(dict(role="assistant", content=answer))
            self.turn += 1

    def prompt(self, question):
        """Return the ids of the conversation and a question, which end with the answer's header.

        If they leave no room for the answer, the oldest turns are left out, then the beginning of
        the question; the system message stays. UserError: it does not fit.
        """
        context = self.model.config.block_size
        room = context - min(self.cfg.max_new_tokens, context // 2)
        history, text = self.messages, last_part(question, context)
        while len(ids := self.encode(history, text)) > room:
            if history:
                history = history[2:]
            elif len(text) > 1:
                text = text[-(len(text) * 3 // 4):]
            else:
                raise UserError(f"the system message has {len(ids):,} tokens; of the context's "
                                f"{context:,} it may fill {room:,}")
        if len(text) < len(question):
            print("sample.py: the question is longer than the context; only its last "
                  f"{len(text):,} characters are read", file=sys.stderr)
        return ids

    def encode(self, history, question):
        """Return the ids of the system message, a history and a question, each cut to what may fit
        the context, and of the answer's header."""
        messages = [*self.system_messages, *history, dict(role="user", content=question)]
        context = self.model.config.block_size
        messages = [m | dict(content=last_part(m["content"], context)) for m in messages]
        return self.tok.encode_chat(messages) + self.tok.role_header("assistant")

    def save(self, path):
        """Write the conversation to a new file, as a line of JSON."""
        if os.path.lexists(path):
            raise UserError(f"{path} exists already; name another file")
        messages = self.system_messages + self.messages
        try:
            write_file(path, json.dumps(dict(messages=messages), ensure_ascii=False) + "\n")
        except (OSError, ValueError) as e:  # ValueError: a NUL in the name
            raise UserError(f"{path!r}: {getattr(e, 'strerror', None) or e}") from e


def chat_in_terminal(chat):
    """Answer each line of the terminal or of a pipe until the input ends."""
    if sys.stdin.isatty():
        with suppress(ImportError):  # Windows' console has its own
            import readline  # arrow keys and history for input()  # noqa: F401
        print("/help lists the commands", file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
            if line == "/quit":
                return
            reply = line[:1] == "/" and run_command(chat, *line[1:].split(maxsplit=1))
            if reply:
                print(printable(reply), file=sys.stderr)
            elif line:
                print_stream(chat.ask(line))
        except KeyboardInterrupt:  # stops the answer, not the program
            print()
        except EOFError:
            return
        except UserError as e:  # a question or system message that does not fit
            print(f"sample.py: {printable(str(e))}", file=sys.stderr)
        except UnicodeDecodeError as e:
            raise UserError(f"the question is not {e.encoding} text (byte {e.start}); set the "
                            "environment variable PYTHONIOENCODING to its encoding") from e


def run_command(chat, name="", text=""):
    """Run the command /name text; return a message about what it did.

    Return None if the line is a question that begins with "/". UserError: text is not a valid
    argument of the command.
    """
    match name, text:
        case "" | "help", "":
            return HELP
        case "new", "":
            chat.begin(chat.system)
            return f"new conversation; system message: {chat.system or 'none'}"
        case "system", _:
            chat.begin(text)
            return f"new conversation; system message: {text or 'none'}"
        case "temperature", _:
            try:
                value = float(text)
            except ValueError:
                raise UserError(f"'{text}' is not a number: /temperature 0.8") from None
            check_range(name, value, *RANGES[name])
            chat.cfg.temperature = value
            return f"temperature: {value:g}"
        case "save", _ if text:
            path = os.path.expanduser(text)
            chat.save(path)
            return f"saved to {path}"
    near = difflib.get_close_matches(re.match("[a-z]*", name.lower())[0], USAGE, 1, cutoff=0.7)
    if near or (not text and name.isascii() and name.isalpha()):
        return f"this is no command. Did you mean:\n{USAGE[near[0]] if near else HELP}"
    return None
