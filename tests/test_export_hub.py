"""Uploads to the hub, with a stub of huggingface_hub's HfApi: what is sent, and that nothing is after an error."""

import sys
import types

import pytest
from test_diffusers_export import folders

from emd_fast.cli import commands
from emd_fast.export import card, hub, pipeline

huggingface_hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("diffusers")


class Api:
    """HfApi that records its calls; `fails` is by the name of a call."""

    def __init__(self, fails):
        self.fails, self.calls, self.files = fails, [], []

    def __call__(self, **options):
        return self

    def _record(self, call, **given):
        self.calls.append((call, given))
        if call in self.fails:
            raise self.fails[call]

    def whoami(self):
        self._record("whoami")
        return {"name": "me"}

    def list_repo_files(self, repo_id):
        self._record("list_repo_files", repo_id=repo_id)
        return self.files

    def create_repo(self, name, **options):
        self._record("create_repo", name=name, **options)
        address = f"https://huggingface.co/me/{name.split('/')[-1]}"
        return type("Url", (str,), {"repo_id": f"me/{name.split('/')[-1]}"})(address)

    def upload_folder(self, *, folder_path, **options):
        files = {p.relative_to(folder_path).as_posix() for p in folder_path.rglob("*") if p.is_file()}
        self._record("upload_folder", files=files, card=(folder_path / "README.md").read_text(), **options)


@pytest.fixture
def api(monkeypatch):
    stub = Api({})
    monkeypatch.setattr(huggingface_hub, "HfApi", stub)
    return stub


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps with adapters, on a teacher without text."""
    root = tmp_path_factory.mktemp("hub")
    folder = folders.unet(root / "teacher")
    words = "--steps 2 --batch-size 3 --langevin-steps 1 --t-star 0.3003003 --input-scale 1 --adapter-rank 2"
    more = ["--teacher", str(folder), "--adapter-targets", '["to_q", "conv1"]', "--out", str(root / "run")]
    assert commands.main(["distill", "pretrained", *words.split(), *more]) == 0
    return root / "run"


def status(code):
    error = huggingface_hub.errors.HfHubHTTPError.__new__(huggingface_hub.errors.HfHubHTTPError)
    OSError.__init__(error, f"{code} for url: https://huggingface.co\n\nmore")
    vars(error)["response"] = types.SimpleNamespace(status_code=code)
    return error


@pytest.mark.slow
def test_a_pipeline_is_uploaded_whole_with_its_card(api, run, tmp_path, capsys):
    assert commands.main(["export", str(run), str(tmp_path / "one-step"), "--push-to-hub", "me/mine"]) == 0
    assert [name for name, _ in api.calls] == ["whoami", "create_repo", "list_repo_files", "upload_folder"]
    assert api.calls[1][1] == {"name": "me/mine", "private": True, "exist_ok": True}
    sent = api.calls[3][1]
    assert sent["repo_id"] == "me/mine"
    here = {p.relative_to(tmp_path / "one-step").as_posix() for p in (tmp_path / "one-step").rglob("*") if p.is_file()}
    assert sent["files"] == here >= {"README.md", "model_index.json", "emd_fast.json"}
    assert 'from_pretrained("me/mine")' in sent["card"] and "FOLDER" not in sent["card"]
    assert "SHA-256" in sent["card"] and str(run.parent) not in sent["card"] and "| mean |" in sent["card"]
    assert capsys.readouterr().out.splitlines()[-1] == "https://huggingface.co/me/mine"
    pipeline.load(tmp_path / "one-step")  # the card is no damage


@pytest.mark.slow
def test_a_lora_is_uploaded_and_may_be_public(api, run, tmp_path):
    words = ["--lora", "--raw", "--push-to-hub", "mine", "--public"]
    assert commands.main(["export", str(run), str(tmp_path / "lora"), *words]) == 0
    assert api.calls[1][1]["private"] is False
    sent = api.calls[3][1]
    assert sent["repo_id"] == "me/mine" and "pytorch_lora_weights.safetensors" in sent["files"]
    assert 'load_lora_weights("me/mine")' in sent["card"] and "FOLDER" not in sent["card"]
    assert "Figures" not in sent["card"]  # they are of the average


@pytest.mark.slow
def test_nothing_is_uploaded_after_a_failed_export(api, run, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    assert commands.main(["export", str(run), str(tmp_path / "mine"), "--push-to-hub", "me/mine"]) == 2
    assert [name for name, _ in api.calls] == ["whoami"] and "not empty" in capsys.readouterr().err


NO_TOKEN = huggingface_hub.errors.LocalTokenNotFoundError("Token is required")
ERRORS = [
    ("whoami", NO_TOKEN, "cannot log in to", "hf auth login"),
    ("whoami", status(401), "cannot log in to", "hf auth login"),
    ("create_repo", status(403), "cannot make", "hf auth login"),
    ("upload_folder", ConnectionError("no route\nto host"), "cannot upload to", "hf upload"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "what", "remedy"), ERRORS)
def test_errors_of_the_hub_are_one_line(api, tmp_path, call, error, what, remedy):
    api.fails[call] = error
    (tmp_path / "README.md").write_text("a card")
    with pytest.raises(hub.HubError) as caught:
        hub.Repository("me/mine").push(tmp_path)
    assert str(caught.value).startswith(f"{what} me/mine on the Hugging Face hub: ")
    assert remedy in str(caught.value) and "\n" not in str(caught.value)
    assert api.calls[-1][0] == call


def test_a_model_with_other_files_is_left_alone(api, tmp_path):
    (tmp_path / "README.md").write_text("a card")
    api.files = [".gitattributes", "README.md"]
    hub.Repository("mine").push(tmp_path)
    assert api.calls[-1][0] == "upload_folder"
    api.files.append("vae/config.json")
    with pytest.raises(hub.HubError, match=r"^me/mine on the Hugging Face hub has files .* as vae/config.json"):
        hub.Repository("mine").push(tmp_path)
    assert api.calls[-1][0] == "list_repo_files"


def test_without_a_network_or_token_nothing_begins(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    api = Api({"whoami": OSError("Connection refused")})
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    assert commands.main(["export", str(tmp_path / "no-run"), str(tmp_path / "out"), "--push-to-hub", "me/mine"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["out.safetensors", "--push-to-hub", "me/mine"], "--push-to-hub writes a folder"),
        (["out", "--public"], "--public is for --push-to-hub NAME"),
        (["out", "--push-to-hub", "a/b/c"], "'a/b/c' is no name on the hub"),
    ],
)
def test_words_that_are_refused(api, tmp_path, capsys, words, said):
    assert commands.main(["export", str(tmp_path), str(tmp_path / words[0]), *words[1:]]) == 2
    assert said in capsys.readouterr().err and not api.calls


def test_without_huggingface_hub_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=r"emd_fast\[diffusers\]"):
        hub.Repository("me/mine")


def test_figures_are_those_of_the_generator():
    metrics = {"frechet": {"real": 1.0, "generator": 2.34567}, "n": 5, "seconds": {"distil": 3}}
    text = card.for_hub("load(FOLDER)\n", "me/mine", metrics)
    assert text.splitlines()[0] == 'load("me/mine")' and text.splitlines()[-1] == "| frechet | 2.346 |"
    assert card.for_hub("text\n", "me/mine", None) == "text\n" == card.for_hub("text\n", "me/mine", {"n": 3})


def test_a_folder_for_emd_fast_alone_gets_a_card(tmp_path):
    trainer = types.SimpleNamespace(teacher=None, teacher_facts={"sha256": "ab12"}, steps_done=3)
    hub.write_card(tmp_path, "me/mine", trainer, None)
    text = (tmp_path / "README.md").read_text()
    assert 'snapshot_download("me/mine")' in text and "ab12" in text and "| steps of training | 3 |" in text
