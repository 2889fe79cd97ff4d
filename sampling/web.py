"""The chat page of `python sample.py --web`: http://127.0.0.1:7860, for this machine alone.

The page is gradio's, an optional dependency (pip install gradio). Conversations live in the
browser; each question comes with all that was said before, so the server remembers nobody.
"""
import html
import itertools
import os
import threading
import time
from types import SimpleNamespace

from config import UserError

# read by gradio when it is imported and launched; it looks at its own page, not through a proxy
QUIET = dict(GRADIO_ANALYTICS_ENABLED="False", GRADIO_RUN_HISTORY="False", no_proxy="127.0.0.1")
CSS = """.table-wrap {max-height: 30vh} .table-wrap td {overflow-wrap: anywhere}"""


def said(message):
    """A message of gradio's history as Chat has them: its content may come in parts."""
    content = message["content"]
    if not isinstance(content, str):
        content = "".join(part.get("text", "") for part in content)
    return dict(role=message["role"], content=content)


def paced(pieces):
    """The text so far, ten times a second: fed each token, the page would fall behind a fast
    model, and notice a press on its stop button half a minute late."""
    text, due = "", 0.0
    for piece in pieces:
        text += piece
        if time.monotonic() >= due:
            yield text
            due = time.monotonic() + 0.1
    yield text


def answers(chat, warn):
    """What gradio calls with a question: it yields the answer so far, longer each time."""
    turns, one_at_a_time = itertools.count(), threading.Lock()

    def answer(question, history, system, temperature, top_p, longest):
        cfg = SimpleNamespace(**vars(chat.cfg) | dict(
            system=system.strip(), temperature=temperature, top_p=top_p, max_new_tokens=longest))
        own = type(chat)(chat.model, chat.tok, cfg)
        own.messages, own.cache = [said(message) for message in history], chat.cache
        own.turn = next(turns)  # another seed: asked again, it says something else
        with one_at_a_time:  # a stopped answer may still be at its last token, in the one cache
            try:
                yield from paced(own.ask(question))
            except UserError as e:
                warn(str(e))  # an error would leave the page's box locked
    return answer


def show_as_text(Chatbot):
    """Show what is said as it is: without Markdown, gradio would still render <b>x</b>.

    The class itself is changed, since each session makes its own of it, and a subclass would have
    gradio write a .pyi file beside this one.
    """
    show, read = Chatbot.postprocess, Chatbot.preprocess

    def postprocess(self, value):
        data = show(self, value)
        for part in (part for message in data.root for part in message.content):
            part.text = html.escape(part.text, quote=False)
        return data

    def preprocess(self, payload):
        messages = read(self, payload)
        for part in (part for message in messages for part in message["content"]):
            part["text"] = html.unescape(part["text"])
        return messages
    Chatbot.postprocess, Chatbot.preprocess = postprocess, preprocess


def page(gr, chat):
    cfg = chat.cfg
    settings = [
        gr.Textbox(cfg.system, label="系统消息", lines=2),
        gr.Slider(0, max(2, cfg.temperature), cfg.temperature, label="温度（0：总选最可能的）"),
        gr.Slider(0.01, 1, cfg.top_p, label="top_p（只从最可能的里选，合计占这么多）"),
        gr.Slider(1, max(1024, cfg.max_new_tokens), cfg.max_new_tokens, step=1,
                  label="回答最长多少词元")]
    made = gr.ChatInterface(
        answers(chat, gr.Warning), title="小语", save_history=True, additional_inputs=settings,
        additional_inputs_accordion=gr.Accordion("设置", open=False, render=False),
        chatbot=gr.Chatbot(label="对话", render_markdown=False, latex_delimiters=[], buttons=[],
                           height="60vh", scale=1, render=False),
        textbox=gr.Textbox(placeholder="说点什么……", submit_btn="发送", stop_btn="停止",
                           autofocus=True, scale=7, render=False),
        analytics_enabled=False, api_visibility="private", concurrency_limit=1,
        show_progress="hidden")
    made.new_chat_button.value, made.new_chat_button.parent.min_width = "新对话", 180
    made.chat_history_dataset.headers = ["以前的对话"]
    # drawn at random, they would lose the browser's conversations at the next start
    made.saved_conversations.storage_key = made.saved_conversations.secret = "xiaoyu"
    return made


def serve(chat):
    """Serve the page until Ctrl-C."""
    os.environ |= QUIET
    try:
        import gradio as gr
    except ImportError as e:
        raise UserError("the chat page needs gradio: pip install gradio") from e
    show_as_text(gr.Chatbot)
    made, port = page(gr, chat), chat.cfg.port
    theme = gr.themes.Default(font=gr.themes.Font("system-ui"),
                              font_mono=gr.themes.Font("monospace"))
    try:
        made.launch(server_name="127.0.0.1", server_port=port, share=False, ssr_mode=False,
                    quiet=True, footer_links=[], theme=theme, css=CSS, prevent_thread_lock=True)
    except (OSError, OverflowError) as e:
        raise UserError(f"port {port} can't be had. Choose another: --port={port + 1}") from e
    print(f"http://127.0.0.1:{port}  (Ctrl-C ends it)", flush=True)
    made.block_thread()
