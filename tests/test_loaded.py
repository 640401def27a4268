"""The public face: what is saved is loaded again, whole, lean and unharmed, or refused with a sentence."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import polyformer as pf
from polyformer.errors import PolyformerError, SpecError, WeightsError
from polyformer.families import Marian, Transformer2017
from polyformer.families.generation import Generation
from polyformer.families.transformer import Depth, NormChoice
from polyformer.generate import Limit, Sampling, Search, Suppress
from polyformer.parts import Dropout
from polyformer.parts.model import TransformerPart
from polyformer.spec import Record
from polyformer.weights.assemble import assemble, disassemble
from polyformer.weights.files import SINGLE, read_tensors, write_tensors
from polyformer.weights.folders import MANIFEST, staged_folder

ROOT = Path(__file__).parents[1]
OWN = Transformer2017(17, 13, width=8, depth=Depth(1, 2), norm=NormChoice("batch", "pre"))
MARIAN = Marian(
    vocab_size=20,
    d_model=8,
    encoder_layers=2,
    decoder_layers=1,
    encoder_ffn_dim=12,
    decoder_ffn_dim=12,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    pad_token_id=19,
    decoder_start_token_id=19,
)


def model_of(config: Transformer2017 | Marian) -> TransformerPart:
    model = config.spec().build()
    assert isinstance(model, TransformerPart)
    return model.eval()


def logits(model: TransformerPart) -> Tensor:
    ids = torch.tensor([[3, 4, 5], [6, 7, 0]])
    with torch.no_grad():
        out = model(ids, ids > 0, ids).logits
    assert out is not None
    return out


@pytest.fixture
def own(tmp_path: Path) -> Path:
    pf.save(pf.Loaded(model_of(OWN)), tmp_path / "own")
    return tmp_path / "own"


@pytest.fixture
def marian(tmp_path: Path) -> Path:
    generation = Generation(decoder_start_token_id=19, eos_token_id=0, pad_token_id=19, num_beams=3)
    pf.save(pf.Loaded(model_of(MARIAN), None, MARIAN, generation), tmp_path / "marian")
    return tmp_path / "marian"


def test_a_folder_of_ours(tmp_path: Path) -> None:
    model = model_of(OWN)
    for buffer in model.buffers():
        buffer.uniform_(0.5, 1.5)
    generation = Generation(eos_token_id=2, others=(("top_k", "3"),))
    pf.save(pf.Loaded(model, generation=generation), tmp_path / "run")
    assert {file.name for file in (tmp_path / "run").iterdir()} == {
        "spec.json",
        SINGLE,
        "generation_config.json",
        MANIFEST,
    }
    loaded = pf.load(str(tmp_path / "run"))
    assert loaded.spec == OWN.spec()
    assert not loaded.model.training
    assert loaded.generation == generation
    assert (loaded.tokenizer, loaded.family, loaded.folder) == (None, None, tmp_path / "run")
    assert logits(loaded.model).equal(logits(model))
    found, wanted = read_tensors(tmp_path / "run"), disassemble(model)
    assert {name: t.tolist() for name, t in found.items()} == {name: t.tolist() for name, t in wanted.items()}
    assert pf.load(tmp_path / "run", dtype=torch.float64).model.head.projection.weight.dtype == torch.float64  # type: ignore[union-attr]


def test_a_rewritten_family_model_is_saved_as_ours(marian: Path, tmp_path: Path) -> None:
    loaded = pf.load(marian)
    assert loaded.family == MARIAN
    assert loaded.generation.num_beams == 3

    def more_dropout(path: str, record: Record) -> Record:
        return Dropout(0.3) if isinstance(record, Dropout) else record

    spec = pf.rewrite(loaded.spec, more_dropout)
    model = assemble(spec, disassemble(loaded.model))
    assert isinstance(model, TransformerPart)
    loaded.model = model
    pf.save(loaded, tmp_path / "mine")
    again = pf.load(tmp_path / "mine")
    assert again.spec == spec
    assert again.generation == loaded.generation
    assert again.family is None


def test_saving_does_not_overwrite_unasked(own: Path) -> None:
    other = pf.Loaded(model_of(OWN))
    with pytest.raises(WeightsError, match="exists already"):
        pf.save(other, own)
    pf.save(other, own, force=True)
    assert logits(pf.load(own).model).equal(logits(other.model))


def test_a_model_may_be_saved_over_the_folder_that_it_is_mapped_from(own: Path) -> None:
    loaded = pf.load(own)
    before = logits(loaded.model)
    with torch.no_grad():
        loaded.model.head.projection.weight.mul_(2)  # type: ignore[union-attr,operator]
    pf.save(loaded, own, force=True)
    assert logits(loaded.model).equal(logits(pf.load(own).model))
    assert not logits(loaded.model).equal(before)


@pytest.mark.parametrize("name", ["spec.json", SINGLE])
def test_a_flipped_bit_is_named(own: Path, name: str) -> None:
    content = bytearray((own / name).read_bytes())
    content[-9] ^= 1
    (own / name).write_bytes(content)
    with pytest.raises(WeightsError, match=f"own/{name} is damaged"):
        pf.load(own)


def test_a_replacement_that_was_cut_off_is_undone(own: Path) -> None:
    own.rename(own.with_name(".own.replaced"))
    assert pf.load(own).spec == OWN.spec()
    assert own.is_dir()


def damage(folder: Path, case: str) -> str:
    """Do something to a Hugging Face folder and return what should be said of it."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    if case == "truncated":
        content = (folder / SINGLE).read_bytes()
        (folder / SINGLE).write_bytes(content[:-100])
        return "model.safetensors is cut off: tensor"
    if case == "pickle":
        (folder / SINGLE).rename(folder / "pytorch_model.bin")
        return "pytorch_model.bin, a pickle"
    if case == "link out":
        (folder / "config.json").rename(folder.parent / "config.json")
        (folder / "config.json").symlink_to("../config.json")
        return "config.json is a link out of its folder"
    if case == "key twice":
        (folder / "config.json").write_text('{"model_type": "marian", "model_type": "bart"}')
        return "config.json has the key 'model_type' twice"
    if case == "not JSON":
        (folder / "config.json").write_text("{'model_type'}")
        return "config.json is not JSON"
    if case == "bad generation":
        (folder / "generation_config.json").write_text('{"num_beams": [1]}')
        return "generation_config.json: .*num_beams should be a whole number|num_beams should be a whole number"
    edits: dict[str, tuple[dict[str, Any], str]] = {
        "remote code": ({"auto_map": {"AutoModel": "evil.Model"}}, "asks to run program code"),
        "unknown family": ({"model_type": "marain"}, "no family 'marain' .did you mean 'marian'"),
        "unread key": ({"rope_theta": 1.0}, "key 'rope_theta'"),
        "deeper": ({"decoder_layers": 2}, "lack 'model.decoder.layers.1."),
        "shallower": ({"encoder_layers": 1}, "no place in this model for 'model.encoder.layers.1."),
        "wider": ({"d_model": 16}, r"has shape \[.*, but the model needs \["),
    }
    changes, message = edits[case]
    (folder / "config.json").write_text(json.dumps(config | changes))
    return message


CASES = ["truncated", "pickle", "link out", "key twice", "not JSON", "bad generation"]
CASES += ["remote code", "unknown family", "unread key", "deeper", "shallower", "wider"]


@pytest.mark.parametrize("case", CASES)
def test_bad_folders_are_refused_quickly(marian: Path, case: str) -> None:
    message = damage(marian, case)
    started = time.process_time()
    with pytest.raises(PolyformerError, match=message):
        pf.load(marian)
    assert time.process_time() - started < 5


def test_what_is_no_model(tmp_path: Path, own: Path) -> None:
    with pytest.raises(WeightsError, match="nothing does not exist"):
        pf.load(tmp_path / "nothing")
    with pytest.raises(WeightsError, match="is a file"):
        pf.load(own / SINGLE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"holds no model: neither spec\.json"):
        pf.load(tmp_path / "empty")
    (own / SINGLE).unlink()
    with pytest.raises(WeightsError, match="holds no finished model"):
        pf.load(own)


def test_translating_needs_a_tokenizer_and_a_list(own: Path) -> None:
    loaded = pf.load(own)
    with pytest.raises(SpecError, match="came without a tokenizer"):
        loaded.translate(["a"])
    loaded.tokenizer = cast(Any, object())
    with pytest.raises(SpecError, match="takes a list of texts"):
        loaded.translate("a")


WORDS = (
    "open",
    "close",
    "save",
    "file",
    "window",
    "folder",
    "now",
    "please",
    "then",
    "all",
    "of",
    "it",
    "with",
    "care",
)


@pytest.fixture
def translator(tmp_path: Path) -> Path:
    """A folder as the reference library leaves it: a random Marian with a SentencePiece tokenizer."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path / "translator"
    sentences = [" ".join(random.Random(i).choices(WORDS, k=6)) for i in range(300)]
    for side in ("source", "target"):
        with (tmp_path / f"{side}.spm").open("wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences), model_writer=file, vocab_size=32, minloglevel=2
            )
    pieces = sentencepiece.SentencePieceProcessor(str(tmp_path / "source.spm"))
    tokens = ["</s>", "<unk>", *(pieces.id_to_piece(i) for i in range(3, 32)), "<pad>"]
    pad = len(tokens) - 1
    config = MARIAN.replace(vocab_size=len(tokens), pad_token_id=pad, decoder_start_token_id=pad)
    model = model_of(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    pad = len(tokens) - 1
    generation = Generation(
        pad, None, 0, pad, forced_eos_token_id=0, bad_words_ids=((pad,),), num_beams=3, max_length=14
    )
    pf.save(pf.Loaded(model, None, config, generation), folder)
    for side in ("source", "target"):
        (tmp_path / f"{side}.spm").rename(folder / f"{side}.spm")
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    return folder


TEXTS = ["save the file", "open all of it now please", "a window"]


def test_translating_as_the_checkpoint_recommends(translator: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    loaded = pf.load(translator)
    assert loaded.tokenizer is not None
    reference = transformers.MarianMTModel.from_pretrained(translator)
    for text, (best, *_) in zip(TEXTS, loaded.translate(TEXTS), strict=True):
        ids = torch.tensor([loaded.tokenizer.encode_source(text)])
        (written,) = reference.generate(input_ids=ids, attention_mask=torch.ones_like(ids)).tolist()
        assert best.ids == [i for i in written if i not in (0, loaded.tokenizer.pad_id)]
        assert best.ids
    pf.save(loaded, tmp_path / "again")
    assert {f.name for f in (tmp_path / "again").iterdir()} == {f.name for f in translator.iterdir()}
    assert pf.load(tmp_path / "again").translate(TEXTS) == loaded.translate(TEXTS)


def test_a_rewritten_model_keeps_its_tokenizer(translator: Path, tmp_path: Path) -> None:
    loaded = pf.load(translator)
    wanted = loaded.translate(TEXTS)
    loaded.family = None
    pf.save(loaded, tmp_path / "mine")
    assert (tmp_path / "mine" / "tokenizer" / "source.spm").is_file()
    assert pf.load(tmp_path / "mine").translate(TEXTS) == wanted


def test_a_tokenizer_of_another_model_is_refused(translator: Path) -> None:
    vocabulary = json.loads((translator / "vocab.json").read_text())
    (translator / "vocab.json").write_text(json.dumps(vocabulary | {"more": 32}))
    with pytest.raises(SpecError, match="the tokenizer has 33 source tokens, but the model only 32"):
        pf.load(translator)
    (translator / "vocab.json").write_text(json.dumps(vocabulary | {"</s>": 5}))
    with pytest.raises(SpecError, match="says eos_token_id = 0, but in its tokenizer that is 5"):
        pf.load(translator)


def test_a_tokenizer_that_leads_out_is_refused(translator: Path) -> None:
    (translator / "source.spm").rename(translator.parent / "elsewhere.spm")
    (translator / "source.spm").symlink_to("../elsewhere.spm")
    with pytest.raises(WeightsError, match=r"source\.spm is a link out of its folder"):
        pf.load(translator)


def test_a_translator_answers_in_the_engine(translator: Path) -> None:
    """Greedily as the search with one beam; drawn, with cuts that leave nothing else, too; and by seeds."""
    loaded = pf.load(translator)
    wanted = [found[0].text for found in loaded.translate(TEXTS, Search(1, limit=Limit(12)))]
    barred = Suppress((loaded.pairs.pad_id,))  # which a search never writes
    assert loaded.generate(TEXTS, Sampling(limit=12, processors=(barred,))) == wanted
    assert loaded.generate(TEXTS, Sampling(2.0, 1, limit=12, processors=(barred,))) == wanted
    drawn = [loaded.generate(TEXTS, Sampling(2.0, limit=12, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(SpecError, match="a conversation needs a decoder-only model"):
        loaded.chat([[{"role": "user", "content": "hi"}]])


def test_the_recommended_search(own: Path) -> None:
    from polyformer.generate import Early, Hopeful, Limit, Power, Safe, Search

    loaded = pf.load(own)
    assert loaded.recommended() == Search()
    said = {
        "num_beams": 6,
        "max_length": 512,
        "forced_eos_token_id": 0,
        "forced_bos_token_id": 5,
        "bad_words_ids": [[7]],
        "renormalize_logits": True,
    }
    loaded.generation = Generation.read(said, {}, "here")
    limit = Limit(511, unfinished="end")
    assert loaded.recommended() == Search(6, 1, Power(1.0), limit, Hopeful(), forbidden=(7,), first=5)
    for word, stop in ((True, Early()), ("never", Safe())):
        loaded.generation = Generation.read({"early_stopping": word}, {}, "here")
        assert loaded.recommended().stop == stop
    loaded.generation = Generation.read({"exponential_decay_length_penalty": [5, 1.1]}, {}, "here")
    with pytest.raises(SpecError, match="a search with exponential_decay_length_penalty"):
        loaded.recommended()


def test_processors_that_a_checkpoint_recommends(own: Path) -> None:
    from polyformer.generate import (
        BadWords,
        Diverse,
        MinimumLength,
        NoRepeatNgram,
        RepetitionPenalty,
        Suppress,
        SuppressFirst,
    )

    loaded = pf.load(own)
    said = {
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[7], [1, 2]],
        "min_length": 56,
        "repetition_penalty": 1.2,
        "suppress_tokens": [4],
        "begin_suppress_tokens": [5],
        "do_sample": True,
        "temperature": 0.6,
        "num_beams": 4,
        "num_beam_groups": 2,
        "diversity_penalty": 0.3,
    }
    loaded.generation = Generation.read(said, {}, "here")
    found = loaded.recommended()
    assert found.forbidden == (7,)
    assert found.diverse == Diverse(2, 0.3)
    assert set(found.processors) == {
        NoRepeatNgram(3),
        BadWords(((1, 2),)),
        MinimumLength(55),
        RepetitionPenalty(1.2),
        Suppress((4,)),
        SuppressFirst((5,)),
    }


MEASURE = """
import sys, torch, polyformer.loaded
from polyformer.families.transformer import Depth, Transformer2017

def held():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

def run(model):
    ids = torch.ones(1, 4, dtype=torch.int64)
    with torch.no_grad():
        model(ids, None, ids)

small = Transformer2017(24, 24, 64, Depth(2, 2), ties="all").spec().build()
run(small)  # what PyTorch and its libraries load when they are first used
before = held()
run(polyformer.load(sys.argv[1]).model)
assert "sympy" not in sys.modules, "PyTorch's symbolic machinery costs a second and 70 MB"
print(held() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_model_is_in_memory_once(tmp_path: Path) -> None:
    spec = Transformer2017(24_000, 24_000, depth=Depth(2, 2), ties="all").spec()
    shapes = disassemble(spec.build("meta"))
    with staged_folder(tmp_path / "large") as stage:
        write_tensors(stage / SINGLE, {name: torch.full(t.shape, 0.01) for name, t in shapes.items()})
        (stage / "spec.json").write_text(spec.to_json())
    size = (tmp_path / "large" / SINGLE).stat().st_size
    assert size > 100e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "large"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1.12 * size


def test_importing_polyformer_imports_nothing_heavy() -> None:
    program = (
        "import sys, polyformer as pf\n"
        "assert not {'torch', 'numpy', 'polyformer.parts', 'polyformer.loaded'} & set(sys.modules)\n"
        "assert pf.Spec and pf.rewrite and pf.walk and pf.SpecError and 'torch' not in sys.modules\n"
        "assert set(pf.__all__) <= set(dir(pf))\n"
        "assert pf.load and pf.save and pf.Loaded and 'torch' in sys.modules\n"
        "try: pf.nothing\n"
        "except AttributeError as error: assert 'nothing' in str(error)\n"
        "else: raise AssertionError\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_the_version_is_the_project_s() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == pf.__version__
