"""A conversation with a model, in the terminal or through a pipe."""
import json
import sys
from pathlib import Path

from common.command_line import UserError
from common.files import write_file
from common.settings import check_range
from gpt import Cache
from models.folders import RANGES
from sampling.text import MAX_TOKEN_CHARS, generate_text, print_stream

HELP = """/new            start a new conversation
/system TEXT    set the system message, and start a new conversation
/temperature X  0 = always the most likely token; higher values vary more
/save FILE      write the conversation as a line of JSON, as prepare.py chat reads it
/quit           end; Ctrl-C stops an answer"""


class Chat:
    """A conversation: its messages, and the key-value cache of what the model has read of them."""

    def __init__(self, model, tok, cfg):
        self.model, self.tok, self.cfg = model, tok, cfg
        self.cache = Cache(len(model.blocks), model.config.block_size)
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
        history, text = self.messages, question[-context * MAX_TOKEN_CHARS:]
        while True:
            messages = [*self.system_messages, *history, dict(role="user", content=text)]
            ids = self.tok.encode_chat(messages) + self.tok.role_header("assistant")
            if len(ids) <= room:
                break
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


def chat_in_terminal(chat):
    """Answer the lines of the terminal, or of a pipe, until they end."""
    if sys.stdin.isatty():
        try:
            import readline  # arrow keys and history for input()  # noqa: F401
        except ImportError:
            pass  # Windows' console has its own
        print("/help lists the commands", file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
            if line == "/quit":
                return
            if line.startswith("/"):
                run_command(chat, *line[1:].split(maxsplit=1))
            elif line:
                print_stream(chat.ask(line))
        except KeyboardInterrupt:  # stops the answer, not the program
            print()
        except EOFError:
            return
        except UserError as e:  # a question or system message that does not fit
            print(f"sample.py: {e}", file=sys.stderr)
        except UnicodeDecodeError as e:
            raise UserError(f"the question is not UTF-8 (byte {e.start})") from e


def run_command(chat, name="", text=""):
    """Run the command /name text."""
    if name == "new":
        chat.begin(chat.system)
    elif name == "system":
        chat.begin(text)
    elif name == "temperature":
        try:
            value = float(text)
            check_range(name, value, *RANGES[name])
            chat.cfg.temperature = value
        except (ValueError, UserError):
            print(f"'{text}' is not a number from 0 to 1000", file=sys.stderr)
    elif name == "save" and text:
        messages = chat.system_messages + chat.messages
        try:
            write_file(Path(text), json.dumps(dict(messages=messages), ensure_ascii=False) + "\n")
            print(f"saved to {text}", file=sys.stderr)
        except (OSError, ValueError) as e:  # ValueError: a NUL in the name
            print(f"{text!r}: {getattr(e, 'strerror', None) or e}", file=sys.stderr)
    else:
        print(HELP, file=sys.stderr)
