"""The page at / in a real Chromium, with a server on a real socket."""

import csv
import io
import json
import re
import shutil
import subprocess
import zipfile

import pytest
import torch
from PIL import Image

from mmllm.data.image import decode_base64
from mmllm.inference.pipeline import load_pipeline
from official import write_model
from server_process import FOREVER, encode, serving, wait_until

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.slow,  # 20 s in all
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("served"), max_position_embeddings=32768, tie_word_embeddings=False)
    pipeline = load_pipeline(folder, device="cpu")
    with torch.no_grad():
        pipeline.model.language_model.lm_head.weight[94:] = 0  # it says nothing but the tokens 0 to 93, printable ASCII
    return pipeline


@pytest.fixture(scope="module")
def server(pipeline):
    with serving(pipeline, slots=2, queue=1, max_new_tokens=FOREVER, max_context=32768) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        flags = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """The page, opened by a new user; an error in its script or a request to another address fails the test."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    context.set_default_timeout(20_000)  # generous, so that a busy machine fails none
    expect.set_options(timeout=20_000)
    page = context.new_page()
    errors, addresses = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if "Content Security" in message.text else None)
    page.on("request", lambda request: addresses.append(request.url))
    visit(page, server)
    yield page
    context.close()
    assert errors == []
    own = (f"http://127.0.0.1:{server.port}/", "data:", "blob:")
    assert [address for address in addresses if not address.startswith(own)] == []


def visit(page, server):
    page.goto(f"http://127.0.0.1:{server.port}/")
    expect(page.locator("#server")).to_contain_text("ready")


def drop(page, *files):
    """Drops files as a file manager does."""
    session = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, "x": 300, "y": 300, "data": data})
    session.detach()


def ask(page, question, tokens=40):
    set_length(page, tokens)
    page.get_by_label("Question", exact=True).fill(question)
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible()  # the answer before is complete
    page.keyboard.press("Enter")


def set_length(page, tokens):
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Length of an answer").fill(str(tokens))
    page.get_by_role("button", name="Done").click()


def answers(page):
    return page.locator(".answer .text")


def clipboard(page):
    return page.evaluate("() => navigator.clipboard.readText()")


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A photo of 6 megapixels, larger than what the page sends as it is."""
    file = tmp_path_factory.mktemp("photo") / "photo.jpg"
    file.write_bytes(encode("JPEG", Image.effect_noise((3000, 2000), 90).convert("RGB"), quality=90))
    return file


def test_the_policy_allows_the_page_its_own_script_and_requests_to_its_server(page, server):
    policy = page.request.get(f"http://127.0.0.1:{server.port}/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    assert re.search(r"script-src 'sha256-[\w+/=]+';", policy)


def test_a_dropped_photo_is_shrunk_and_its_answer_streams(page, photo):
    sizes = []
    page.on("request", lambda request: sizes.append(len(request.post_data_buffer or b"")))
    drop(page, photo)
    expect(page.locator("#attached")).to_contain_text("photo.jpg")
    ask(page, "What is this?", tokens=400)
    expect(page.locator(".answer")).to_contain_text(re.compile(r"400 tokens · [\d.]+ tokens/s · first word after"))
    assert photo.stat().st_size > 1_000_000 and 10_000 < max(sizes) < 400_000
    assert answers(page).text_content()


def test_an_answer_stops_and_is_asked_again(page, server):
    ask(page, "Hello", tokens=8000)
    expect(answers(page)).to_contain_text(re.compile("..."))
    page.keyboard.press("Escape")
    expect(page.locator(".answer")).to_contain_text("Stopped")
    wait_until(lambda: server.busy_and_waiting() == (0, 0))
    set_length(page, 40)
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".answer")).to_contain_text("40 tokens ·")


def test_a_conversation_is_there_after_a_reload_until_it_is_deleted(page, photo, server):
    drop(page, photo)
    ask(page, "What is this?")
    ask(page, "And what else?")
    expect(page.locator(".answer").nth(1)).to_contain_text("40 tokens ·")
    said = answers(page).all_text_contents()
    visit(page, server)
    assert answers(page).all_text_contents() == said
    expect(page.locator(".question img")).to_have_count(1)
    with page.expect_download() as download:
        page.get_by_role("button", name="Export: What is this?").click()
    exported = json.loads(download.value.path().read_text())
    assert [turn["answer"] for turn in exported[0]["turns"]] == said
    page.get_by_role("button", name="Delete: What is this?").click()
    expect(page.locator("#history li")).to_have_count(0)
    visit(page, server)
    expect(page.get_by_text("Drop an image here")).to_be_visible()


def test_the_curl_command_of_an_answer_gives_that_answer(page, photo, tmp_path):
    drop(page, photo)
    ask(page, 'A "quote", it\'s $HOME, `date` and \\n?')
    ask(page, "Once more")
    expect(page.locator(".answer").nth(1)).to_contain_text("40 tokens ·")
    uri = page.locator(".question img").get_attribute("src")
    (tmp_path / "image1.jpg").write_bytes(decode_base64(uri))
    for i in range(2):
        page.get_by_role("button", name="Copy as curl").nth(i).click()
        expect(page.locator("#toast")).to_have_text("Copied")
        said = subprocess.run(clipboard(page), shell=True, cwd=tmp_path, capture_output=True, check=True).stdout
        assert json.loads(said)["choices"][0]["message"]["content"] == answers(page).nth(i).text_content()


def test_a_photo_from_the_camera_is_asked_about(page):
    page.get_by_role("button", name="Take a photo").first.click()
    page.get_by_role("button", name="Take the photo").click()
    expect(page.locator("#attached")).to_contain_text("photo.jpg")
    assert page.locator("#attached img").evaluate("image => image.decode().then(() => image.naturalWidth)") > 100


def test_text_is_never_taken_for_html(page, tmp_path):
    html = "<img src=x onerror=document.title='broken-in'><b>bold</b>"
    ask(page, html)
    expect(page.locator(".answer")).to_contain_text("40 tokens ·")
    assert html in page.locator(".question").text_content()
    assert page.locator("#log b, #history b").count() == 0 and page.title() == "mmllm"


def test_a_folder_becomes_a_table_that_survives_a_reload_in_the_middle(page, server, tmp_path):
    folder = tmp_path / "holiday"
    folder.mkdir()
    for i in range(19):
        (folder / f"{i}.png").write_bytes(encode(image=Image.new("RGB", (40, 30), (13 * i, 90, 200))))
    (folder / "broken.png").write_bytes(encode()[:200])
    (folder / "notes.txt").write_text("no image")
    set_length(page, 20)
    page.get_by_role("tab", name="Batch").click()
    drop(page, folder)
    expect(page.locator("tbody tr")).to_have_count(20)
    page.get_by_label("Question").last.fill('What is it?\nWhere, "exactly"?')
    page.get_by_role("button", name="Start").click()
    expect(page.locator("#batch-status")).to_contain_text(re.compile("[1-9] of 20 done"))
    visit(page, server)
    page.get_by_role("tab", name="Batch").click()
    expect(page.locator("tbody tr")).to_have_count(20)
    page.get_by_role("button", name="Continue").click()
    expect(page.locator("#batch-status")).to_have_text("19 of 20 done · 1 failed", timeout=20_000)
    expect(page.locator("td.bad")).to_have_text("This image is broken or cut off. Save or send it again.")

    def exported(name):
        with page.expect_download() as download:
            page.get_by_role("button", name=name).click()
        return download.value.path().read_bytes()

    rows = json.loads(exported("JSON"))
    assert len(rows) == 40 and sum("error" in row for row in rows) == 2
    table = list(csv.DictReader(io.StringIO(exported("CSV").decode(), newline="")))
    assert [
        {name: text for name, text in row.items() if text or name == "answer" and not row["error"]} for row in table
    ] == rows
    with zipfile.ZipFile(io.BytesIO(exported(".txt"))) as archive:
        assert archive.testzip() is None
        texts = {name: archive.read(name).decode() for name in archive.namelist()}
    assert len(texts) == 19 and rows[0]["answer"] in texts["holiday/0.txt"]
    status, body = server.call("GET", "/health")
    assert body["slots"]["busy"] == 0


def test_a_full_server_is_asked_again_after_a_countdown(page, server):
    busy = [server.start_chat(), server.start_chat()]
    wait_until(lambda: server.busy_and_waiting()[0] == 2)
    busy.append(server.start_chat())
    wait_until(lambda: server.busy_and_waiting() == (2, 1))
    ask(page, "Hello")
    expect(page.locator(".problem")).to_contain_text(
        re.compile(r"The server is busy with other requests. Next try in \d+ s.")
    )
    expect(page.locator("#server")).to_contain_text("1 request waiting")
    for connection in busy:
        connection.close()
    wait_until(lambda: server.busy_and_waiting() == (0, 0))
    page.get_by_role("button", name="Try now").click()
    expect(page.locator(".answer")).to_contain_text("40 tokens ·")


def test_a_server_that_is_gone_is_asked_again_when_it_is_back(page):
    page.context.set_offline(True)
    ask(page, "Hello")
    expect(page.locator(".problem")).to_contain_text("The server cannot be reached. Is it still running? Next try in")
    page.context.set_offline(False)
    page.get_by_role("button", name="Try now").click()
    expect(page.locator(".answer")).to_contain_text("40 tokens ·")


def test_a_missing_key_is_asked_for_and_the_question_asked_again(browser, pipeline):
    with serving(pipeline, api_key="secret") as server:
        page = browser.new_page()
        visit(page, server)
        ask(page, "Hello")
        expect(page.get_by_label("API key")).to_be_focused()
        page.get_by_label("API key").fill("secret")
        page.get_by_role("button", name="Done").click()
        expect(page.locator(".answer")).to_contain_text("40 tokens ·")
        assert page.evaluate("() => localStorage.mmllm.includes('secret')") is False
        page.close()


def test_everything_that_can_be_operated_has_a_name_for_a_screen_reader(page, photo):
    session = page.context.new_cdp_session(page)
    roles = ("button", "textbox", "tab", "tabpanel", "spinbutton", "radio", "progressbar", "image", "dialog", "region")

    def names():
        nodes = session.send("Accessibility.getFullAXTree")["nodes"]
        shown = [node for node in nodes if not node["ignored"] and node["role"]["value"] in roles]
        assert len(shown) >= 8
        return [node["name"]["value"] for node in shown]

    drop(page, photo)
    assert all(names())
    ask(page, "What is this?")
    expect(page.locator(".answer")).to_contain_text("40 tokens ·")
    assert all(names())
    page.get_by_role("tab", name="Batch").click()
    drop(page, photo)
    expect(page.locator("tbody tr")).to_have_count(1)
    assert all(names())
    page.get_by_role("button", name="Settings").click()
    assert {"Settings", "As the system", "Light", "Dark", "Done"} <= set(names()) and all(names())


def test_the_keyboard_alone_is_enough(page):
    page.get_by_role("tab", name="Ask").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Batch")).to_be_focused()
    expect(page.get_by_role("button", name="Choose images")).to_be_visible()


def test_nothing_is_wider_than_a_small_screen(browser, server):
    page = browser.new_page(viewport={"width": 390, "height": 700})
    visit(page, server)
    ask(page, "supercalifragilistic" * 20)
    for tab in ("Batch", "Ask"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("() => document.documentElement.scrollWidth") == 390
    page.close()
