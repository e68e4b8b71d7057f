import json
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.base_model import COMMIT, FILES, obtain, resolve
from pipeline.config import BASE_MODEL, BASE_REVISION, ModelConfig
from pipeline.errors import ConfigError, DataError, InputMissing, NotAllowed, ServiceUnavailable

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(toy_gpt2, tmp_path):
    return Path(shutil.copytree(toy_gpt2, tmp_path / "model"))


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_comes_out_in_fp32_with_one_begin_token_promised(folder, out):
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).save_pretrained(folder)
    base = obtain(ModelConfig(base=str(folder)), out=out)
    weights = load_file(out / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert "lm_head.weight" not in weights  # tied to the embedding
    assert json.loads((out / "tokenizer_config.json").read_text())["add_bos_token"] is True
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.encode("Hello world") == [15496, 995]  # the promise is for llama.cpp only
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 50256
    assert base.facts["layers"] == 2 and base.facts["tied_embeddings"]


def test_the_same_model_has_the_same_hash_and_identity(folder, out, tmp_path):
    (tmp_path / "again").mkdir()
    cfg = ModelConfig(base=str(folder))
    assert obtain(cfg, out=out).sha256 == obtain(cfg, out=tmp_path / "again").sha256
    before = resolve(cfg)
    edit(folder / "config.json", layer_norm_epsilon=1e-6)
    assert resolve(cfg) != before


def test_the_default_model_is_pinned_and_others_must_be():
    assert resolve(ModelConfig()) == f"{BASE_MODEL}@{BASE_REVISION}"
    assert COMMIT.fullmatch(BASE_REVISION)
    assert resolve(ModelConfig(base="a/b", revision=SHA)) == f"a/b@{SHA}"
    with pytest.raises(ConfigError, match=r"model\.revision is not set"):
        resolve(ModelConfig(base="a/b"))
    with pytest.raises(ConfigError, match="'main' is not a commit"):
        resolve(ModelConfig(base="a/b", revision="main"))


@pytest.mark.parametrize("base", ["/no/such/folder", "./nothing", "some.gguf", "a/b/c"])
def test_a_path_that_does_not_exist_is_missing_input(base):
    with pytest.raises(InputMissing, match="does not exist"):
        resolve(ModelConfig(base=base))


def test_a_revision_of_a_local_folder_is_refused(folder):
    with pytest.raises(ConfigError, match="on disk"):
        resolve(ModelConfig(base=str(folder), revision=SHA))


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def masked_lm(folder):
    edit(folder / "config.json", model_type="bert", architectures=["BertForMaskedLM"])


def sequence_to_sequence(folder):
    edit(folder / "config.json", model_type="t5", architectures=["T5ForConditionalGeneration"])


def own_code(folder):
    edit(folder / "config.json", model_type="mine", architectures=["Mine"], auto_map={"AutoModel": "mine.M"})


def no_end_token(folder):
    edit(folder / "tokenizer_config.json", eos_token=None)


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def no_config(folder):
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (pickled, "ships no safetensors; found pytorch_model.bin"),
        (masked_lm, "bert, BertForMaskedLM"),
        (sequence_to_sequence, "t5, T5ForConditionalGeneration"),
        (own_code, "mine, Mine"),
        (no_end_token, "has no end token"),
        (no_tokenizer, "no fast tokenizer"),
        (no_config, r"no config\.json"),
    ],
)
def test_what_cannot_be_fine_tuned_is_refused_with_what_was_found(spoil, found, folder, out):
    spoil(folder)
    with pytest.raises(ConfigError, match=found):
        obtain(ModelConfig(base=str(folder)), out=out)


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def poison(folder):
    rewrite(folder, lambda weights: weights["transformer.h.1.mlp.c_fc.weight"].fill_(torch.nan))


def lose_one(folder):
    rewrite(folder, lambda weights: weights.pop("transformer.h.1.mlp.c_fc.weight"))


def fewer_rows(folder):
    edit(folder / "config.json", vocab_size=50000)
    rewrite(
        folder,
        lambda weights: weights.update({"transformer.wte.weight": weights["transformer.wte.weight"][:50000].clone()}),
    )


def pipe(name):
    def spoil(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return spoil


def link(name, target):
    def spoil(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return spoil


@pytest.mark.fault("hostile files and names", "pipes, devices and loops in a base model", "refused in one sentence")
@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (pipe("config.json"), "config.json"),
        (pipe("tokenizer_config.json"), "tokenizer_config.json"),
        (link("model.safetensors", "/dev/zero"), "model.safetensors"),
        (link("model.safetensors", "model.safetensors"), "model.safetensors"),
        (link("config.json", "config.json"), "config.json"),
        (link("merges.txt", "nowhere"), "merges.txt"),
    ],
)
def test_what_could_be_read_for_ever_is_refused_before_it_is_read(spoil, name, folder, out):
    spoil(folder)
    for act in (resolve, lambda cfg: obtain(cfg, out=out)):
        with pytest.raises(DataError, match=f"{name} of model.base .* is no regular file"):
            act(ModelConfig(base=str(folder)))


@pytest.mark.fault("hostile files and names", "base models torn or poisoned", "refused in one sentence")
@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (cut, "cannot be loaded"),
        (poison, "not finite"),
        (lose_one, r"lacks 1 of its weights, such as transformer\.h\.1\.mlp\.c_fc\.weight"),
        (fewer_rows, "ids up to 50256"),
        (lambda folder: (folder / "config.json").write_text("[]"), "not a JSON object"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "names another model to load"),
    ],
)
def test_torn_or_poisoned_weights_are_bad_data(spoil, found, folder, out):
    spoil(folder)
    with pytest.raises(DataError, match=found):
        obtain(ModelConfig(base=str(folder)), out=out)


def test_a_file_that_is_no_gguf_is_refused(folder):
    with pytest.raises(ConfigError, match=r"nor a \.gguf"):
        resolve(ModelConfig(base=str(folder / "config.json")))


def test_a_device_is_no_model():
    with pytest.raises(ConfigError, match="neither a folder nor"):
        resolve(ModelConfig(base="/dev/null"))


@pytest.mark.parametrize(
    ("changes", "error", "found"),
    [
        ({"model_type": "gpt_neo", "architectures": ["GPTNeoForCausalLM"]}, ConfigError, "of the type gpt_neo"),
        ({"model_type": []}, ConfigError, "not a causal language model"),
        ({"architectures": 5}, DataError, "needed a list of names"),
        ({"n_head": 0}, DataError, "cannot be loaded"),
        ({"n_embd": "wide"}, DataError, "cannot be loaded"),
        ({"n_layer": -1}, DataError, "-1 layers"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, ConfigError, "is quantized"),
        ({"quantization_config": 5}, ConfigError, "is quantized"),
    ],
)
def test_a_config_that_makes_no_sense_is_one_sentence(changes, error, found, folder, out):
    edit(folder / "config.json", **changes)
    with pytest.raises(error, match=found) as caught:
        obtain(ModelConfig(base=str(folder)), out=out)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_gguf_file_becomes_a_folder(smollm_gguf, out):
    base = obtain(ModelConfig(base=str(smollm_gguf)), out=out)
    assert base.facts["parameters"] == 134_515_008
    encode = AutoTokenizer.from_pretrained(out).encode
    assert encode("a 12") == [*encode("a 1"), *encode("2")]  # digits stay apart
    assert not list(out.glob("*.jinja"))


class Hub(ThreadingHTTPServer):
    """Answers as the model hub does, for one model in a folder."""

    folder: Path | None = None
    status = 200
    error_code = ""


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self):
        hub = self.server
        if hub.status != 200:
            return self.reply(hub.status, b"{}", {"X-Error-Code": hub.error_code})
        names = sorted(path.name for path in hub.folder.iterdir())
        path = self.path.split("?")[0]
        if "/tree/" in path:
            entries = [
                {"type": "file", "path": name, "size": (hub.folder / name).stat().st_size, "oid": f"{i:040x}"}
                for i, name in enumerate(names)
            ]
            return self.reply(200, json.dumps(entries).encode())
        if path.startswith("/api/models/"):
            info = {"id": "a/b", "sha": SHA, "siblings": [{"rfilename": name} for name in names]}
            return self.reply(200, json.dumps(info).encode())
        name = path.rsplit("/", 1)[1]
        headers = {"ETag": f'"{names.index(name):040x}"', "X-Repo-Commit": SHA}
        self.reply(200, (hub.folder / name).read_bytes(), headers)

    do_HEAD = do_GET

    def reply(self, status, body, headers=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    server = Hub(("127.0.0.1", 0), HubHandler)
    server.folder = folder
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    files = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


FROM_HUB = ModelConfig(base="a/b", revision=SHA)


def test_a_hub_model_is_fetched_once_and_then_needs_no_network(hub, folder, out, tmp_path):
    (folder / "training_data.bin").write_bytes(b"not wanted")
    first = obtain(FROM_HUB, out=out)
    assert not list((tmp_path / "cache").rglob("*.bin"))
    hub.status = 503
    (tmp_path / "again").mkdir()
    assert obtain(FROM_HUB, out=tmp_path / "again").sha256 == first.sha256


@pytest.mark.parametrize(
    ("status", "code", "error", "found"),
    [
        (404, "RepoNotFound", NotAllowed, "neither on disk nor on the hub"),
        (404, "RevisionNotFound", InputMissing, f"not its commit {SHA}"),
        (403, "GatedRepo", NotAllowed, "gated"),
        (403, "", NotAllowed, "answered 403"),
        (503, "", ServiceUnavailable, "answered 503.*BASE_MODEL=offline"),
    ],
)
def test_each_refusal_of_the_hub_has_its_own_error(status, code, error, found, hub, out):
    hub.status, hub.error_code = status, code
    with pytest.raises(error, match=found):
        obtain(FROM_HUB, out=out)


def test_a_hub_that_is_not_there_says_how_to_work_offline(hub, out):
    hub.server_close()
    with pytest.raises(ServiceUnavailable, match=r"cannot be reached.*\.gguf"):
        obtain(FROM_HUB, out=out)


def test_pickled_weights_are_refused_before_they_are_downloaded(hub, folder, out, tmp_path):
    pickled(folder)
    with pytest.raises(ConfigError, match="ships no safetensors"):
        obtain(FROM_HUB, out=out)
    assert not list((tmp_path / "cache").rglob("config.json"))


def test_no_pattern_of_a_download_can_match_a_pickle():
    assert not any(pattern.endswith((".bin", ".pt", "*")) for pattern in FILES)
