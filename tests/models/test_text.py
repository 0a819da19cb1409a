"""Text: every source gives unit rows in the order of the names, and bad input is told apart in words."""

import json
import logging
import os
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from fusekern.config import TextConfig
from fusekern.errors import FusekernError
from fusekern.models.text import embed_names, mean_token_cosine, text_width

CLIP_TEXT = Path(__file__).resolve().parents[3] / "shared" / "data" / "clip_text"


@pytest.fixture
def table(tmp_path):
    """Writes an embedding file with its names file; gives the configuration that points at both."""

    def write(rows, names, suffix=".npy"):
        file = tmp_path / f"rows{suffix}"
        if suffix == ".npy":
            np.save(file, rows)
        else:
            save_file({"text": torch.as_tensor(rows)}, file)
        (tmp_path / "names.txt").write_text("".join(f"{name}\n" for name in names))
        return TextConfig(source="file", file=str(file), names=str(tmp_path / "names.txt"))

    return write


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """A CLIP of random weights in an open_clip folder."""
    folder = tmp_path_factory.mktemp("clip")
    settings = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    for name, quick in (("fusekern-test", False), ("fusekern-test-quickgelu", True)):
        (folder / f"{name}.json").write_text(json.dumps({**settings, "quick_gelu": quick}))
        open_clip.add_model_config(folder / f"{name}.json")
    model = open_clip.create_model("fusekern-test")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings, "preprocess_cfg": {}}))
    return folder


def error_of(names, config):
    with pytest.raises(FusekernError) as caught:
        embed_names(names, config)
    return str(caught.value)


# hash


def test_hash_vectors_are_the_same_everywhere():
    vectors = embed_names(["wall", "sky"], TextConfig(source="hash", width=4)).vectors
    # Recorded; they follow from SHAKE-256 by integer arithmetic, one square root and one division, all exact.
    expected = torch.tensor(
        [[-0.42559725, -0.528373063, -0.67331332, -0.293833405], [0.101277538, 0.949008048, -0.258820385, 0.148790464]]
    )
    assert torch.equal(vectors, expected)


def test_hash_vectors_depend_on_the_name_alone():
    config = TextConfig(source="hash", width=64)
    both, one = embed_names(["a", "b"], config), embed_names(["b"], config)
    assert torch.equal(both.vectors[1], one.vectors[0])
    assert not torch.equal(both.vectors[0], both.vectors[1])


def test_hash_vectors_are_unit_isotropic_and_own_up():
    text = embed_names([str(i) for i in range(150)], TextConfig(source="hash", width=512))
    assert text.vectors.dtype == torch.float32 and text.vectors.shape == (150, 512)
    torch.testing.assert_close(text.vectors.norm(dim=1), torch.ones(150))
    cosine = (text.vectors @ text.vectors.T).fill_diagonal_(0)
    # 11175 cosines of standard deviation 1/sqrt(512) = 0.044: six deviations bound them but once in 10^5 tables.
    assert cosine.abs().max() < 6 * 512**-0.5
    assert not text.language_prior and text.describe() == "hash vectors (no language prior)"


# files


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_file_rows_are_found_by_name(table, suffix):
    rows = np.eye(3, 5, dtype=np.float16) * np.float16(4)
    config = table(rows, ["tree", "sky", "car"], suffix)
    text = embed_names(["car", "tree"], config)
    assert torch.equal(text.vectors, torch.eye(3, 5)[[2, 0]])
    assert text.names == ("car", "tree") and text.language_prior
    assert text.describe() == f"file rows{suffix}" and text_width(config) == 5


def test_missing_names_come_with_the_nearest(table):
    message = error_of(["car", "sidewalks", "qqq"], table(np.eye(3), ["car", "sidewalk", "sky"]))
    assert (
        "lacks 2 of 3" in message
        and "'sidewalks' (nearest: 'sidewalk'" in message
        and "'qqq' (nearest: none)" in message
    )


def test_names_file_of_another_length(table):
    assert "has 2 names" in (message := error_of(["car"], table(np.eye(3), ["car", "sky"]))) and "has 3 rows" in message


def test_ambiguous_name(table):
    assert "more than one row for car" in error_of(["car"], table(np.eye(3), ["car", "sky", "car"]))


@pytest.mark.parametrize("value", [np.nan, np.inf, 0])
def test_rows_without_direction(table, value):
    rows = np.eye(2, dtype=np.float32)
    rows[1] = value
    assert "zero or not finite: sky" in error_of(["car", "sky"], table(rows, ["car", "sky"]))


def test_wrong_number_of_dimensions(table):
    assert "[names, width], found [3]" in error_of(["car"], table(np.ones(3), ["car"]))


def test_pickled_array_is_refused(tmp_path, table):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pickle-ran"),)

    config = table(np.eye(1), ["car"])
    np.save(tmp_path / "rows.npy", np.array([Payload()], dtype=object), allow_pickle=True)
    assert "cannot be read without pickle" in error_of(["car"], config)
    assert not (tmp_path / "pickle-ran").exists()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (TextConfig(source="file"), "text.file: needed"),
        (TextConfig(source="file", file="nowhere.npy"), "nowhere.npy not found"),
        (TextConfig(source="file", file=__file__), "must end in .npy or .safetensors"),
    ],
)
def test_unusable_file(config, words):
    assert words in error_of(["car"], config)


def test_names_file_is_needed(table):
    config = table(np.eye(1), ["car"])
    assert "text.names: needed" in error_of(["car"], TextConfig(source="file", file=config.file))


@pytest.mark.skipif(not CLIP_TEXT.is_dir(), reason="real CLIP embeddings are not beside this checkout")
def test_real_embeddings_agree_between_files():
    def rows(name):
        names = (CLIP_TEXT / f"{name}.txt").read_text().split("\n")[: {"voc_20": 20, "coco_stuff_171": 171}[name]]
        file, listing = CLIP_TEXT / f"{name}_single.npy", CLIP_TEXT / f"{name}.txt"
        return set(names), TextConfig(source="file", file=str(file), names=str(listing))

    (voc, voc_config), (coco, coco_config) = rows("voc_20"), rows("coco_stuff_171")
    shared = sorted(voc & coco)
    assert len(shared) == 14
    cosine = embed_names(shared, voc_config).vectors @ embed_names(shared, coco_config).vectors.T
    # The same prompt and tower, stored in fp16: each of 512 entries is off by at most 2^-11 of itself.
    assert (cosine.diagonal() - 1).abs().max() < 1e-3
    assert cosine.fill_diagonal_(0).max() < 0.98


# open_clip


def test_open_clip_folder(tower):
    config = TextConfig(model=f"local-dir:{tower}")
    text = embed_names(["wall", "dining table"], config)
    model = open_clip.create_model("fusekern-test", pretrained=str(tower / "open_clip_model.safetensors")).eval()
    tokens = open_clip.get_tokenizer("fusekern-test")(["a photo of a wall.", "a photo of a dining table."])
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model.encode_text(tokens))
    torch.testing.assert_close(text.vectors, expected)
    torch.testing.assert_close(text.vectors.norm(dim=1), torch.ones(2))
    assert not text.vectors.requires_grad and text.language_prior and text_width(config) == 24
    assert text.describe() == f"open_clip local-dir:{tower}, prompt 'a photo of a {{}}.'"


def test_weights_file_and_quickgelu(tower, caplog):
    """The activation cannot be seen in a weights file: the name of the model decides, and that is said."""
    file = str(tower / "open_clip_model.safetensors")
    plain = embed_names(["wall"], TextConfig(model="fusekern-test", pretrained=file))
    assert "need text.model fusekern-test-quickgelu" in caplog.text
    quick = embed_names(["wall"], TextConfig(model="fusekern-test-quickgelu", pretrained=file))
    assert (plain.vectors - quick.vectors).abs().max() > 1e-4


def test_openai_tag_gets_quickgelu(tower, monkeypatch):
    """open_clip itself only warns, and computes with the wrong activation."""
    asked = {}

    def create_model(name, **arguments):
        asked.update(arguments)
        return original("fusekern-test")

    original = open_clip.create_model
    monkeypatch.setattr(open_clip, "create_model", create_model)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name, get=open_clip.get_tokenizer: get("fusekern-test"))
    embed_names(["wall"], TextConfig(model="ViT-B-16", pretrained="openai"))
    assert asked["force_quick_gelu"] is True and asked["weights_only"] is True and asked["require_pretrained"] is True
    embed_names(["wall"], TextConfig(model="ViT-B-16", pretrained="laion2b_s34b_b88k"))
    assert asked["force_quick_gelu"] is False


def test_long_prompt_is_cut_with_a_warning(tower, caplog):
    with caplog.at_level(logging.WARNING, "fusekern"):
        embed_names(["wall", "very " * 20 + "long wall"], TextConfig(model=f"local-dir:{tower}"))
    cut = [record.message for record in caplog.records if "cut to 16 tokens" in record.message]
    assert len(cut) == 1 and "long wall" in cut[0]


def test_failed_download_names_the_local_option(monkeypatch):
    def create_model(name, **arguments):
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip, "create_model", create_model)
    message = error_of(["wall"], TextConfig())
    assert "no route to host" in message and "local-dir:FOLDER" in message and "text.source: file" in message


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (TextConfig(model="ViT-B16"), "nearest: ViT-B-16"),
        (TextConfig(pretrained="openia"), "tags: openai"),
        (TextConfig(prompt="a photo"), "must contain {}"),
        (TextConfig(model="local-dir:nowhere"), "nowhere"),
    ],
)
def test_unusable_open_clip_settings(config, words):
    assert words in error_of(["wall"], config)


def test_folder_without_weights(tower, tmp_path):
    (tmp_path / "open_clip_config.json").write_text((tower / "open_clip_config.json").read_text())
    assert "cannot load" in error_of(["wall"], TextConfig(model=f"local-dir:{tmp_path}"))


def test_width_needs_no_tower(monkeypatch):
    monkeypatch.setattr(open_clip, "create_model", None)
    assert text_width(TextConfig()) == 512 and text_width(TextConfig(model="RN50")) == 1024
    assert text_width(TextConfig(source="hash", width=96)) == 96
    with pytest.raises(FusekernError, match="embed_dim"):
        text_width(TextConfig(model="local-dir:nowhere"))


# collapse


def test_mean_token_cosine():
    tokens = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    unit = torch.nn.functional.normalize(tokens, dim=-1)
    pairs = [unit[b, i] @ unit[b, j] for b in range(2) for i in range(5) for j in range(5) if i != j]
    found = mean_token_cosine(tokens)
    # float32 against float64
    torch.testing.assert_close(found, torch.stack(pairs).mean().float(), atol=1e-6, rtol=0)
    assert not found.requires_grad
    assert mean_token_cosine(torch.ones(1, 4, 3)).item() == pytest.approx(1)
    assert mean_token_cosine(torch.eye(4)[None]).item() == pytest.approx(0)
    assert mean_token_cosine(torch.randn(3, 1, 4)).item() == 1
