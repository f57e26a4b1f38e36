"""The page: through Gradio's own client, and in a real browser without a window."""

import os
import shutil
import socket
import sys
import time
import urllib.request
from urllib.parse import urlsplit

import pytest
from PIL import Image

from pixart_fast import demo
from pixart_fast.pictures import read_settings
from pixart_fast.pipeline import PixArtPipeline
from pixart_fast.samplers import SAMPLERS
from tests import published

try:
    import gradio
    import gradio_client
except ImportError:
    gradio = None
needs_gradio = pytest.mark.skipif(gradio is None, reason="Gradio is not installed: pip install 'pixart_fast[demo]'")

ASKED = {
    "negative": "",
    "size": "64x32",
    "sampler": "ddim",
    "steps": 2,
    "guidance": 3,
    "count": 2,
    "seed": 7,
    "new_seed": False,
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = published.save(tmp_path_factory.mktemp("model") / "alpha", sample_size=32, interpolation_scale=1.0)
    return PixArtPipeline.from_pretrained(folder, device="cpu", precision="fp32", text_precision="fp32")


@pytest.fixture(scope="module")
def address(pipeline, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("cache")))
        page = demo.build(pipeline, tmp_path_factory.mktemp("pictures"))
        yield demo.serve(page, pipeline, "127.0.0.1", free_port(), block=False)
        page.close(verbose=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def client(address, tmp_path_factory):
    return gradio_client.Client(address, verbose=False, download_files=tmp_path_factory.mktemp("downloads"))


@needs_gradio
def test_pictures_with_their_settings(client):
    shown, settings, seed, unread, report = client.predict("a cat", **ASKED, api_name="/paint")
    assert [picture["caption"] for picture in shown] == ["seed 7", "seed 8"] and seed == 7
    assert report.startswith("2 pictures in ") and not unread["visible"]
    for picture, number in zip(shown, (7, 8), strict=True):
        assert Image.open(picture["image"]).size == (64, 32)
        made = read_settings(picture["image"])
        assert made | {"seed": 7} == settings and made["seed"] == number
    expected = {"prompt": "a cat", "sampler": "ddim", "steps": 2, "guidance": 3, "width": 64, "height": 32}
    assert expected.items() <= settings.items()


@needs_gradio
def test_the_pictures_are_the_pipelines_own(client, pipeline):
    shown, *_ = client.predict("a dog", **ASKED, api_name="/paint")
    again = pipeline("a dog", size=(32, 64), sampler="ddim", steps=2, guidance=3.0, num_images=2, seed=7)
    for picture, image in zip(shown, again.images, strict=True):
        assert Image.open(picture["image"]).tobytes() == image.tobytes()


@needs_gradio
def test_a_new_seed_is_told_and_makes_the_picture_again(client):
    seeds = set()
    for _ in range(2):
        shown, settings, seed, *_ = client.predict("a cat", **ASKED | {"new_seed": True}, api_name="/paint")
        assert settings["seed"] == seed != 7
        seeds.add(seed)
    again, *_ = client.predict("a cat", **ASKED | {"seed": seed}, api_name="/paint")
    assert Image.open(again[0]["image"]).tobytes() == Image.open(shown[0]["image"]).tobytes()
    assert len(seeds) == 2


@needs_gradio
def test_what_the_model_does_not_read_is_shown(client):
    *_, unread, _ = client.predict("a cat " * 100, **ASKED, api_name="/paint")
    assert unread["visible"] and unread["value"].startswith(("a cat", "cat a"))


MISTAKES = {
    "no prompt": ("  ", {}, "there is no prompt: write what is to be painted."),
    "size": ("a cat", {"size": "1000x750"}, "1000x750 does not divide by 16: take 992x752."),
    "no size": ("a cat", {"size": "<b>big</b>"}, "&lt;b&gt;big"),
    "seed": ("a cat", {"seed": -1}, "a seed is a whole number from 0"),
    "no seed": ("a cat", {"seed": None}, "a seed is a whole number from 0"),
}


@needs_gradio
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_sentence(client, name, capfd):
    prompt, given, message = MISTAKES[name]
    with pytest.raises(gradio_client.exceptions.AppError) as raised:
        client.predict(prompt, **ASKED | given, api_name="/paint")
    assert message in str(raised.value) and "Traceback" not in str(raised.value) + capfd.readouterr().err


@needs_gradio
def test_memory_that_ran_out_is_told(client, pipeline, monkeypatch):
    def fail(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(pipeline.vae, "decode", fail)
    with pytest.raises(gradio_client.exceptions.AppError, match="memory of cpu ran out: try a batch size below"):
        client.predict("a cat", **ASKED, api_name="/paint")


@needs_gradio
def test_requests_take_turns_and_report_to_nobody(pipeline, tmp_path):
    page = demo.build(pipeline, tmp_path)
    (paint,) = [function for function in page.fns.values() if function.api_name == "paint"]
    assert paint.concurrency_limit == "default" and page._queue.default_concurrency_limit == 1
    assert page.analytics_enabled is False and os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def test_samplers_have_the_defaults_of_the_pipeline(pipeline):
    for name, info in SAMPLERS.items():
        if name != "lcm":
            assert demo.usual(pipeline, name) == (info.steps, info.guidance)
    assert demo.usual(pipeline, "lcm")[1] == 1
    assert {name for _, name in demo.possible(pipeline)} == set(SAMPLERS)


def test_iddpm_is_not_offered_without_a_variance(tmp_path):
    folder = published.save(tmp_path / "alpha", sample_size=8, out_channels=4)
    pipeline = PixArtPipeline.from_pretrained(folder, device="cpu", precision="fp32", text_precision="fp32")
    assert {name for _, name in demo.possible(pipeline)} == set(SAMPLERS) - {"iddpm"}


def test_without_gradio_the_command_that_installs_it_is_told(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(sys, "argv", ["demo"])
    assert demo.main(["--model", "nowhere"]) == 2
    assert "the page needs Gradio: `pip install 'pixart_fast[demo]'`." in capsys.readouterr().err


@needs_gradio
def test_a_missing_model_and_a_taken_port(pipeline, address, tmp_path, capsys):
    assert demo.main(["--model", "nowhere"]) == 2
    assert "nowhere is neither a folder nor the name of a model" in capsys.readouterr().err
    with pytest.raises(OSError, match="choose another --port"):
        demo.serve(demo.build(pipeline, tmp_path), pipeline, "127.0.0.1", urlsplit(address).port, block=False)


def test_help_teaches():
    shown = " ".join(demo.arguments().format_help().split())
    for word in ("--model DIR", "--host", "(127.0.0.1)", "(7860)", "0.0.0.0 opens it to everyone"):
        assert word in shown


def browser():
    """Chromium without a window, by Selenium; skips where one of them is missing."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="Selenium is not installed: pip install selenium")
    found = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if None in found.values():
        pytest.skip("there is no browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = found["chromium"]
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1400,1000"):
        options.add_argument(f"--{argument}")
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(found["chromedriver"]))


@needs_gradio
def test_in_a_browser(address, pipeline, tmp_path, monkeypatch):
    """Prompt, button, progress, picture, its file; a mistake; nothing fetched from elsewhere."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    denoise = pipeline.denoise

    def slowly(*args, on_step, **kwargs):
        def step(done, total):
            on_step(done, total)
            time.sleep(0.3)  # Gradio shows a step after a tenth of a second

        return denoise(*args, on_step=step, **kwargs)

    monkeypatch.setattr(pipeline, "denoise", slowly)
    with browser() as driver:
        wait = WebDriverWait(driver, 30, poll_frequency=0.05, ignored_exceptions=[StaleElementReferenceException])

        def all_of(selector):
            return driver.find_elements(By.CSS_SELECTOR, selector)

        driver.get(address)
        (prompt,) = wait.until(lambda _: all_of("#prompt textarea"))
        prompt.send_keys("a red cat in the snow")
        all_of("#new-seed input")[0].click()
        for field, text in (("#size input", "32x32"), ("#steps input[type=number]", "4")):
            enter(all_of(field)[0], text, Keys)
        all_of("#paint")[0].click()
        wait.until(lambda _: any("Painting" in element.text for element in all_of("#pictures .progress-level")))
        (picture,) = wait.until(lambda _: all_of("#pictures img"))
        file = tmp_path / "picture.png"
        urllib.request.urlretrieve(picture.get_attribute("src"), file)
        settings = read_settings(file)
        assert settings["prompt"] == "a red cat in the snow" and settings["seed"] == 0 and settings["steps"] == 4
        assert Image.open(file).size == (32, 32)
        wait.until(lambda _: all_of("#report")[0].text.startswith("1 picture in "))

        enter(all_of("#size input")[0], "100x100", Keys)
        all_of("#paint")[0].click()
        told = "100x100 does not divide by 16: take 96x96."
        wait.until(lambda _: any(told in toast.text for toast in all_of(".toast-body.error")))
        assert "Traceback" not in driver.page_source
        fetched = driver.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
        own = urlsplit(address).netloc
        assert fetched and {urlsplit(url).netloc for url in fetched if url.startswith("http")} == {own}
        driver.save_screenshot(os.environ.get("PIXART_FAST_SCREENSHOT") or str(tmp_path / "page.png"))


def enter(field, text: str, keys) -> None:
    field.send_keys(keys.CONTROL, "a")
    field.send_keys(text, keys.ENTER, keys.TAB)


@needs_gradio
def test_the_command_serves_on_this_machine_until_it_is_stopped(pipeline, monkeypatch, capsys):
    port, answers = free_port(), []

    def visit(page):
        with urllib.request.urlopen(page.local_url, timeout=10) as answer:
            answers.append(answer.read())

    monkeypatch.setattr(gradio.Blocks, "block_thread", visit)
    assert demo.main(["--model", pipeline.name, "--device", "cpu", "--port", str(port)]) == 0
    assert capsys.readouterr().out.startswith(f"http://127.0.0.1:{port}/") and b"pixart_fast" in answers[0]
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), 1)
