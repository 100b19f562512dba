"""Code in the folder of a model or dataset is not run, whatever its files ask for."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest
import torch

import jobs
import omni
from omni.corpus.sources import Options, open_source
from omni.errors import ManifestError
from omni.model.download import SourceError
from omni.model.lm.hf import load_pretrained
from omni.model.lm.pretrained import find_pretrained, hf_tokenizer
from tests.helpers.hf_folders import random_model

# Not the functions of `datasets`, which has run no scripts since 4.0 and has no such argument.
ASKED = {"from_config"}


def _evil(folder: Path, name: str) -> Path:
    """Code that leaves a mark when it is imported."""
    folder.mkdir(exist_ok=True)
    mark = folder.parent / "ran"
    classes = "".join(
        f"class {kind}({base}): model_type = 'evil'\n"
        for kind, base in (("Config", "PretrainedConfig"), ("Model", "PreTrainedModel"))
    )
    (folder / name).write_text(
        f"open({str(mark)!r}, 'w').write('x')\n"
        f"from transformers import PretrainedConfig, PreTrainedModel\n{classes}"
    )
    return mark


def test_a_model_with_its_own_code_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    mark = _evil(folder, "evil.py")
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    about = {"model_type": "evil", "auto_map": names, "hidden_size": 8, "vocab_size": 8}
    (folder / "config.json").write_text(json.dumps(about))
    for load in (lambda: find_pretrained(f"hf:{folder}"), lambda: load_pretrained(folder, None)):  # type: ignore[arg-type]
        with pytest.raises(SourceError, match=r"/model: .*auto_map.*no code") as caught:
            load()
        assert "\n" not in str(caught.value)
    assert not mark.exists() and "evil" not in sys.modules


def test_a_known_model_with_its_own_code_is_loaded_without_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    random_model("llama").save_pretrained(folder)
    mark = _evil(folder, "evil.py")
    about = json.loads((folder / "config.json").read_text())
    about["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(about))
    assert type(load_pretrained(folder, torch.float32)).__name__ == "LlamaForCausalLM"
    assert not mark.exists()


def test_a_tokenizer_with_its_own_code_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    mark = _evil(folder, "evil.py")
    names = {"AutoTokenizer": ["evil.Tokenizer", None]}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Evil", "auto_map": names})
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "evil"}))
    with pytest.raises(SourceError, match="/model: ") as caught:
        hf_tokenizer(folder)
    assert "\n" not in str(caught.value) and not mark.exists()


def test_a_dataset_with_a_loading_script_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    mark = _evil(folder, "set.py")
    with pytest.raises(ManifestError):
        source = open_source(f"hf:{folder}", Options())
        list(source.read(source.parts()[0]))
    assert not mark.exists()


def test_every_loader_says_that_it_trusts_no_code() -> None:
    found = 0
    for package in (Path(module.__file__ or "").parent for module in (omni, jobs)):
        for path in sorted(package.rglob("*.py")):
            written = path.read_text()
            if not any(name in written for name in ("from_pretrained", *ASKED)):
                continue
            tree = ast.parse(written)
            texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
            scripts = [t for t in texts if isinstance(t, str) and "from_pretrained(" in t]
            for part in (tree, *(ast.parse(text) for text in scripts if "def main" in text)):
                for call in ast.walk(part):
                    if not isinstance(call, ast.Call):
                        continue
                    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
                    if name == "from_pretrained" or name in ASKED:
                        found += 1
                        given = {k.arg: ast.unparse(k.value) for k in call.keywords}
                        assert given.get("trust_remote_code") == "False", f"{path}: {name}"
    assert found >= 9
