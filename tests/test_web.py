"""The laws of the chat page, as a reader of Chinese sees it in headless Chromium
(pip install gradio selenium; apt-get install chromium chromium-driver)."""
import shutil
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ENV, ROOT, one_line, run

from data.tokenizer import train_bytebpe
from engine.rundir import RunDir
from gpt import GPT, GPTConfig

pytest.importorskip("gradio")
webdriver = pytest.importorskip("selenium.webdriver")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
if not BROWSER or not shutil.which("chromedriver"):
    pytest.skip("no chromium with its chromedriver here", allow_module_level=True)

READY_WITHIN = 240  # seconds; importing torch and gradio takes 10 on a slow core
SWITCHES = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
            "disable-background-networking", "disable-component-update", "disable-sync",
            "disable-dev-shm-usage", "window-size=900,700", "lang=zh-CN", "accept-lang=zh-CN"]
NAME = "(e.innerText.split('\\n')[0].trim() || e.title)"  # of a button, e
BOT, USER, LISTED = "[data-testid=bot]", "[data-testid=user]", ".table-wrap tbody td"
# every length the answer is seen to have; a driver asking again and again would miss most
WATCH = """const seen = window.seen = new Set();
new MutationObserver((_, watch) => {
  for (const e of document.querySelectorAll("[data-testid=bot]")) seen.add(e.textContent.length);
  if (seen.size > 5) watch.disconnect();
}).observe(document, {subtree: true, childList: true, characterData: true});"""


def until(condition, seconds=60):
    """What condition() gives as soon as it is true; elements may vanish while it looks."""
    from selenium.common.exceptions import WebDriverException
    deadline, last = time.monotonic() + seconds, None
    while time.monotonic() < deadline:
        try:
            if last := condition():
                return last
        except WebDriverException as e:
            last = e
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {last!r}")


class Page:
    """What a person does with the page, and sees of it."""

    def __init__(self, driver, address):
        self.driver = driver
        driver.get(address)
        driver.execute_script("localStorage.clear()")
        driver.get(address)
        until(self.ready)

    def look(self, css, take):
        """What take, JavaScript of an element e, gives for all that are seen, at one moment."""
        return self.driver.execute_script(
            "return [...document.querySelectorAll(arguments[0])].filter(e => e.offsetParent)"
            f".map(e => {take})", css)

    def texts(self, css):
        return self.look(css, "e.innerText.trim()")

    def box(self):
        return self.look("textarea", "e")[0]

    def buttons(self):
        """Their texts, or tooltips where they show none."""
        return self.look("button", NAME)

    def click(self, name):
        """At the moment it is seen: a page that streams draws its buttons anew."""
        until(lambda: self.look("button", f"{NAME} == '{name}' && (e.click(), true)").count(True))

    def ask(self, question):
        self.box().send_keys(question + "\n")
        until(lambda: self.texts(USER)[-1:] == [question])
        until(lambda: self.texts(BOT)[-1:] > [""])

    def ready(self):
        return "发送" in self.buttons() and self.box().is_enabled()

    def stop(self):
        self.click("停止")
        until(self.ready)


def chatterer(out):
    """out/final: a chat model that has learned nothing, and never likes an end token best."""
    tok = train_bytebpe(["你好，我是小语。再说一次完"] * 9, 280)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=384, n_ids=tok.n_ids, block_size=128, n_layer=1, n_head=2,
                          n_embd=32))
    with torch.no_grad():  # logits of 0 are not among the 50 highest of 280
        model.wte.weight[[tok.eot, tok.im_start, tok.im_end]] = 0
    RunDir(SimpleNamespace(out_dir=str(out)), "chat", True).save_model(
        "final", model, model.state_dict(), tok, {})


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A page whose model goes on for 50,000 tokens, minutes: its address, folder and command."""
    place = tmp_path_factory.mktemp("web")
    chatterer(place / "out" / "tiny")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["sample.py", "--web", f"--port={port}", "--model=out/tiny/final",
             "--max_new_tokens=50000", "--device=cpu"]
    log, address = place / "log", f"http://127.0.0.1:{port}/"
    # a proxy that is not there: whatever went through it would fail
    env = ENV | {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    with open(log, "wb") as file:
        process = subprocess.Popen([sys.executable, str(ROOT / words[0]), *words[1:]], cwd=place,
                                   env=env, stdout=file, stderr=subprocess.STDOUT)
    try:
        until(lambda: b"http" in log.read_bytes() or process.poll() is not None, READY_WITHIN)
        assert process.poll() is None, log.read_text(encoding="utf-8")
        yield SimpleNamespace(address=address, place=place, words=words)
        assert "Traceback" not in log.read_text(encoding="utf-8", errors="replace")
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for switch in [*SWITCHES, f"user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(f"--{switch}")
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def page(server, driver):
    return Page(driver, server.address)


def test_an_answer_grows_as_it_is_made_and_stop_ends_it(page):
    page.driver.execute_script(WATCH)
    page.ask("你好")
    until(lambda: page.driver.execute_script("return window.seen.size") >= 5)
    page.stop()
    (stopped,) = page.texts(BOT)
    page.ask("再说一次")  # the next one is served at once, and nothing was added meanwhile
    page.stop()
    assert page.texts(BOT)[0] == stopped
    assert 0 < len(stopped) < 25000


def test_a_new_chat_is_empty_and_the_old_one_comes_back(page):
    page.ask("第一个问题")
    page.stop()
    until(lambda: page.texts(LISTED) == ["第一个问题"])
    answer = page.texts(BOT)
    page.click("新对话")
    until(lambda: not page.texts(USER) and not page.texts(BOT))
    assert page.texts(LISTED) == ["第一个问题"]
    page.look(LISTED, "e")[0].click()
    until(lambda: page.texts(USER) == ["第一个问题"])
    assert page.texts(BOT) == answer


def test_markup_is_shown_as_it_was_typed(page):
    typed = "<b>x</b><script>document.title=1</script> &amp; **你好** $$x$$"
    page.ask(typed)
    page.stop()
    until(lambda: page.texts(LISTED))
    page.click("新对话")
    until(lambda: not page.texts(USER))
    page.look(LISTED, "e")[0].click()  # neither now nor when it comes back from the browser's store
    until(lambda: page.texts(USER) == [typed])
    assert not page.driver.find_elements("css selector", "[role=log] b, [role=log] script")
    assert page.driver.title == "小语"


def test_the_page_is_chinese_and_asks_nothing_of_other_hosts(page, server):
    assert page.box().get_attribute("placeholder") == "说点什么……"
    page.ask("你好")
    page.stop()
    assert set(page.buttons()) == {"新对话", "发送", "设置", "清空对话", "重试", "撤销"}
    urls = page.driver.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name)")
    assert urls and not [u for u in urls if not u.startswith((server.address, "data:"))]


def test_a_phone_needs_no_sideways_scrolling(page):
    phone = dict(width=375, height=700, deviceScaleFactor=1, mobile=True)
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        page.ask("很长" * 50)
        page.stop()
        page.click("设置")
        until(lambda: page.texts(LISTED))
        assert page.driver.execute_script(
            "return [innerWidth, document.documentElement.scrollWidth]") == [375, 375]
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_taken_port_is_one_line(server):
    one_line(run(server.place, *server.words), server.words[2].removeprefix("--port="), "--port=")
