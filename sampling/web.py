"""The chat page of `python sample.py --web` at http://127.0.0.1:7860, for this machine only.

It uses gradio, an optional dependency (pip install gradio). The browser stores the conversations
and sends the whole history with each question; the server stores nothing.
"""
import html
import itertools
import os
import threading
import time
from types import SimpleNamespace

from common.command_line import UserError, optional_package
from sampling.chat import Chat

# read by gradio at import and at launch, when it requests its own page: not through a proxy
GRADIO_ENV = dict(GRADIO_ANALYTICS_ENABLED="False", GRADIO_RUN_HISTORY="False",
                  no_proxy="127.0.0.1")
# the question stays on the screen of a phone ("clip", because "hidden" would make it scroll away)
CSS = """.gr-group:has(#question) {position: sticky; bottom: 0; z-index: 1}
.gradio-container {overflow: clip !important}
.table-wrap {max-height: 30vh} .table-wrap td {overflow-wrap: anywhere}"""
LABELS = {"chatbot.clear": "清空对话", "chatbot.retry": "重试", "chatbot.undo": "撤销"}
EXAMPLES = ("你好，你是谁？", "春天有什么特点？", "用一句话介绍长江。")


def throttle(pieces):
    """Yield the text so far, at most ten times a second.

    With an update for each token the page falls behind a fast model, and its stop button reacts
    half a minute late.
    """
    text, next_update = "", 0.0
    for piece in pieces:
        text += piece
        if time.monotonic() >= next_update:
            yield text
            next_update = time.monotonic() + 0.1
    yield text


def answer_function(chat, warn):
    """Return the function that gradio calls with a question; it yields the answer so far."""
    turns, lock = itertools.count(), threading.Lock()

    def answer(question, history, system, temperature, top_p, max_new_tokens):
        cfg = SimpleNamespace(**vars(chat.cfg) | dict(
            system=system.strip(), temperature=temperature, top_p=top_p,
            max_new_tokens=max_new_tokens))
        request = Chat(chat.model, chat.tok, cfg)
        request.messages = [dict(role=m["role"], content="".join(p["text"] for p in m["content"]))
                            for m in history]
        request.cache = chat.cache
        request.turn = next(turns)  # a new seed, so that the same question gets another answer
        with lock:  # all requests share the cache; a stopped one may still compute its last token
            try:
                yield from throttle(request.ask(question))
            except UserError as e:
                warn(str(e))  # after an exception the page's text box would stay locked
    return answer


def show_as_text(Chatbot):
    """Make gradio show messages as plain text: without Markdown it would still render <b>x</b>.

    This patches the class, because each session makes its own instance, and because for a subclass
    gradio would write a .pyi file into this folder.
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


def build_page(gr, chat):
    """Return the page, a gr.ChatInterface."""
    cfg = chat.cfg
    settings = [
        gr.Textbox(cfg.system, label="系统消息", lines=2),
        gr.Slider(0, max(2, cfg.temperature), cfg.temperature, label="温度（0：总选最可能的）"),
        gr.Slider(0.01, 1, cfg.top_p, label="top_p（只从最可能的里选，合计占这么多）"),
        gr.Slider(1, max(1024, cfg.max_new_tokens), cfg.max_new_tokens, step=1,
                  label="回答最长多少词元")]
    page = gr.ChatInterface(
        answer_function(chat, lambda text: gr.Warning(text, title="没有回答")),
        title="小语", description=f"模型：`{cfg.model}`",
        examples=[[question] for question in EXAMPLES], run_examples_on_click=False,
        validator=lambda question: gr.validate(bool(question.strip()), "先写一个问题"),
        save_history=True, additional_inputs=settings,
        additional_inputs_accordion=gr.Accordion("设置", open=False, render=False),
        chatbot=gr.Chatbot(label="对话", render_markdown=False, latex_delimiters=[], buttons=[],
                           height="max(40dvh, 100dvh - 354px)", scale=1, render=False),
        textbox=gr.Textbox(placeholder="说点什么……", label="问题", submit_btn="发送", stop_btn="停止",
                           autofocus=True, scale=7, render=False, elem_id="question"),
        analytics_enabled=False, api_visibility="private", concurrency_limit=1,
        show_progress="hidden")
    history, button = page.chat_history_dataset, page.new_chat_button
    button.value, button.parent.min_width = "新对话", 180
    history.headers = ["第一个问题"]
    with page, button.parent, gr.Accordion("以前的对话", open=False):
        history.unrender()
        history.render()
    # they are random by default, which would lose the browser's conversations at the next start
    page.saved_conversations.storage_key = page.saved_conversations.secret = "xiaoyu"
    return page


def serve(chat):
    """Serve the page until Ctrl-C."""
    os.environ |= GRADIO_ENV
    with optional_package("the chat page", "gradio"):
        import gradio as gr
    show_as_text(gr.Chatbot)
    page, port = build_page(gr, chat), chat.cfg.port
    theme = gr.themes.Default(font=gr.themes.Font("system-ui"),
                              font_mono=gr.themes.Font("monospace"))
    try:
        page.launch(server_name="127.0.0.1", server_port=port, share=False, ssr_mode=False,
                    quiet=True, footer_links=[], theme=theme, css=CSS, prevent_thread_lock=True,
                    i18n=gr.I18n(en=LABELS))  # for browsers that are not Chinese
    except (OSError, OverflowError) as e:
        raise UserError(f"port {port} can't be used. Choose another: --port={port + 1}") from e
    print(f"http://127.0.0.1:{port}  (Ctrl-C ends it)", flush=True)
    page.block_thread()
