"""Laws of the chat page, tested in headless Chromium
(pip install gradio selenium; apt-get install chromium chromium-driver)."""
import shutil
import sys
from types import SimpleNamespace

import pytest
import servers
import torch
from conftest import ENV, ROOT, one_line, run

from gpt import GPT, GPTConfig
from models.hf import save_model
from tokens.tokenizer_files import train_bytebpe

pytest.importorskip("gradio")
webdriver = pytest.importorskip("selenium.webdriver")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
if not BROWSER or not shutil.which("chromedriver"):
    pytest.skip("no chromium with its chromedriver here", allow_module_level=True)

SWITCHES = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
            "disable-background-networking", "disable-component-update", "disable-sync",
            "disable-dev-shm-usage", "window-size=900,700",
            "lang=en-US", "accept-lang=en-US"]  # the page is Chinese in any browser
NAME = "(e.innerText.split('\\n')[0].trim() || e.title)"  # JavaScript: the name of a button e
BOT, USER, LISTED = "[data-testid=bot]", "[data-testid=user]", ".table-wrap tbody td"
# records every length that the answer has; polling through the driver would miss most
WATCH = """const seen = window.seen = new Set();
new MutationObserver((_, watch) => {
  for (const e of document.querySelectorAll("[data-testid=bot]")) seen.add(e.textContent.length);
  if (seen.size > 5) watch.disconnect();
}).observe(document, {subtree: true, childList: true, characterData: true});"""


def until(condition):
    """Return condition() as soon as it is true; elements may vanish during the call."""
    from selenium.common.exceptions import WebDriverException
    return servers.until(condition, ignored=WebDriverException)


class Page:
    """The page as a user operates and sees it."""

    def __init__(self, driver, address):
        self.driver = driver
        driver.get(address)
        driver.execute_script("localStorage.clear()")
        driver.get(address)
        until(self.ready)

    def look(self, css, take):
        """Return the value of take, JavaScript of an element e, for each visible element of css."""
        return self.driver.execute_script(
            "return [...document.querySelectorAll(arguments[0])].filter(e => e.offsetParent)"
            f".map(e => {take})", css)

    def texts(self, css):
        return self.look(css, "e.innerText.trim()")

    def box(self):
        return self.look("textarea", "e")[0]

    def buttons(self):
        """Return the texts of the visible buttons, or their tooltips."""
        return self.look("button", NAME)

    def click(self, name):
        """Click a button in the same script that finds it: streaming replaces the buttons."""
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


def write_endless_model(out):
    """Write out/final: an untrained chat model that never generates an end token."""
    tok = train_bytebpe(["你好，我是小语。再说一次完"] * 9, 280)
    torch.manual_seed(0)
    model = GPT(GPTConfig(padded_vocab_size=384, vocab_size=tok.vocab_size, block_size=128,
                          n_layer=1, n_head=2, n_embd=32))
    with torch.no_grad():  # their logits are 0: not among the 50 highest of 280
        model.wte.weight[[tok.eot, tok.im_start, tok.im_end]] = 0
    save_model(out / "final", model, model.state_dict(), tok, "chat", {})


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Return address, folder and command of a page whose answers take minutes (50,000 tokens)."""
    place, port = tmp_path_factory.mktemp("web"), servers.free_port()
    write_endless_model(place / "out" / "tiny")
    words = ["sample.py", "--web", f"--port={port}", "--model=out/tiny/final",
             "--max_new_tokens=50000", "--device=cpu"]
    # a proxy that does not exist: any request through it would fail
    env = ENV | {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    with servers.running([sys.executable, ROOT / words[0], *words[1:]], place, env,
                         lambda log: b"http" in log.read_bytes()) as log:
        yield SimpleNamespace(address=f"http://127.0.0.1:{port}/", place=place, words=words)
        assert "Traceback" not in log.read_text(encoding="utf-8", errors="replace")


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


def test_an_answer_is_streamed_and_the_stop_button_ends_it(page):
    page.driver.execute_script(WATCH)
    page.ask("你好")
    until(lambda: page.driver.execute_script("return window.seen.size") >= 5)
    page.stop()
    (stopped,) = page.texts(BOT)
    page.ask("再说一次")  # answered at once, and the stopped answer has not grown
    page.stop()
    assert page.texts(BOT)[0] == stopped
    assert 0 < len(stopped) < 25000


def test_a_new_chat_is_empty_and_the_old_one_can_be_reopened(page):
    page.ask("第一个问题")
    page.stop()
    page.click("以前的对话")
    until(lambda: page.texts(LISTED) == ["第一个问题"])
    answer = page.texts(BOT)
    page.click("新对话")
    until(lambda: not page.texts(USER) and not page.texts(BOT))
    assert page.texts(LISTED) == ["第一个问题"]
    page.look(LISTED, "e")[0].click()
    until(lambda: page.texts(USER) == ["第一个问题"])
    assert page.texts(BOT) == answer


def test_markup_in_a_question_is_shown_as_text(page):
    typed = "<b>x</b><script>document.title=1</script> &amp; **你好** $$x$$"
    page.ask(typed)
    page.stop()
    page.click("以前的对话")
    until(lambda: page.texts(LISTED))
    page.click("新对话")
    until(lambda: not page.texts(USER))
    page.look(LISTED, "e")[0].click()  # also when it is read back from the browser's storage
    until(lambda: page.texts(USER) == [typed])
    assert not page.driver.find_elements("css selector", "[role=log] b, [role=log] script")
    assert page.driver.title == "小语"


def test_the_page_is_chinese_and_requests_nothing_from_other_hosts(page, server):
    assert page.box().get_attribute("placeholder") == "说点什么……"
    page.ask("你好")
    page.stop()
    assert set(page.buttons()) == {"新对话", "以前的对话", "发送", "设置", "清空对话", "重试", "撤销"}
    assert page.texts("p") == ["模型：out/tiny/final"]
    urls = page.driver.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name)")
    assert urls and not [u for u in urls if not u.startswith((server.address, "data:"))]


def test_an_example_fills_the_box_and_an_empty_question_is_not_asked(page):
    examples = page.texts(".example-text")
    assert len(examples) == 3
    page.click(examples[1])
    until(lambda: page.box().get_attribute("value") == examples[1])
    page.box().clear()
    page.box().send_keys(" \n")
    until(lambda: "先写一个问题" in page.texts("main")[0])
    page.ask("你好")
    page.stop()
    page.driver.refresh()  # an empty one would be listed by the key of a translation
    until(page.ready)
    page.click("以前的对话")
    until(lambda: page.texts(LISTED) == ["你好"])


def test_a_phone_shows_the_box_and_needs_no_sideways_scrolling(page):
    phone = dict(width=390, height=844, deviceScaleFactor=1, mobile=True)

    def box_is_on_the_screen():
        (bottom,) = page.look("#question textarea", "e.getBoundingClientRect().bottom")
        return bottom < page.driver.execute_script("return innerHeight")
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        assert box_is_on_the_screen() and not page.texts(".table-wrap")
        page.ask("很长" * 50)
        page.stop()
        page.click("以前的对话")
        page.click("设置")
        until(lambda: page.texts(LISTED))
        assert box_is_on_the_screen()
        assert page.driver.execute_script(
            "return [innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_taken_port_is_one_line(server):
    one_line(run(server.place, *server.words), server.words[2].removeprefix("--port="), "--port=")
