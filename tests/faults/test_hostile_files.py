"""Files that try to run something: pickles, templates, YAML tags, code beside a model. A canary tells."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import random
import shutil
import zipfile
import zlib

import numpy as np
import pytest
import yaml

from tests.helpers import campaigns
from tests.helpers.bad_input import flags, start_each, write_rows
from tests.helpers.distributed import run_ranks
from tests.helpers.fault_points import command_main
from tests.helpers.hf_folders import edit
from tests.helpers.hf_models import random_model

pytestmark = pytest.mark.slow

# -- payloads: each touches the file `canary` where it runs ------------------------------------------------------------


def reducing(function, *arguments):
    class Bomb:
        def __reduce__(self):
            return function, arguments

    return Bomb()


def touch(canary):
    return f"__import__('pathlib').Path({str(canary)!r}).touch()"


PICKLES = {
    "os.system": lambda canary: pickle.dumps(reducing(os.system, f"touch {canary}")),
    "os.system, protocol 0": lambda canary: pickle.dumps(reducing(os.system, f"touch {canary}"), protocol=0),
    "eval": lambda canary: pickle.dumps({"state": [reducing(eval, touch(canary))]}),
    "exec in a tuple": lambda canary: pickle.dumps((1, reducing(exec, touch(canary))), protocol=4),
    "open": lambda canary: pickle.dumps(reducing(open, str(canary), "w")),
    "instance opcode": lambda canary: f"(S'touch {canary}'\nios\nsystem\n.".encode(),
    "getattr of a module": lambda canary: pickle.dumps(reducing(getattr, reducing(__import__, "os"), "system")),
    "second pickle": lambda canary: pickle.dumps(1) + pickle.dumps(reducing(os.system, f"touch {canary}")),
}
TEMPLATES = {
    "globals of cycler": "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "globals of self": "{{ self.__init__.__globals__.__builtins__.open('CANARY', 'w') }}",
    "subclasses": "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{% if c.__name__ == '_wrap_close' %}"
    "{{ c.__init__.__globals__['system']('touch CANARY') }}{% endif %}{% endfor %}",
    "attr filter": "{{ messages|attr('__class__')|attr('__base__')|attr('__subclasses__')() }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "function globals": "{{ raise_exception.__globals__['os'].system('touch CANARY') }}",
    "include": "{% include '/etc/hostname' %}",
    "import": "{% import 'os' as os %}{{ os.system('touch CANARY') }}",
}
YAML_TAGS = {
    "apply": "!!python/object/apply:os.system ['touch CANARY']",
    "new": "!!python/object/new:os.system ['touch CANARY']",
    "name": "!!python/name:os.system",
    "module": "!!python/module:os",
    "object": "!!python/object:pathlib.Path {}",
    "tuple": "!!python/tuple [1, 2]",
    "merge": "{<<: !!python/object/apply:pathlib.Path.touch [CANARY]}",
}
CODE = "import pathlib\npathlib.Path({canary!r}).touch()\nclass Hostile:\n    pass\n"
AUTO_MAPS = {
    "config.json": {"AutoConfig": "hostile.Hostile", "AutoModelForCausalLM": "hostile.Hostile"},
    "tokenizer_config.json": {"AutoTokenizer": ["hostile.Hostile", "hostile.Hostile"]},
    "generation_config.json": {"AutoModel": "hostile.Hostile"},
}

# -- where they are put: each returns the command line of `train` that meets the file ----------------------------------


class World:
    """A model folder, a run with a checkpoint and rows, copied for each case."""

    def __init__(self, folder, hf, run):
        self.folder, self.hf, self.run = folder, folder / "hf", folder / "run"
        shutil.copytree(hf, self.hf)
        shutil.copytree(run, self.run)
        self.rows, self.canary = write_rows(folder / "train.jsonl"), folder / "canary"

    def from_hf(self, **changes):
        changes = {"load": self.hf, "tokenizer_type": None, "save": self.folder / "new"} | changes
        shape = dict.fromkeys(("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"))
        return flags(self.folder, **shape | changes)

    def resume(self, **changes):
        return flags(self.folder, **{"load": self.run, "save": self.run, "train_iters": 3} | changes)


def in_checkpoint(world, name, payload):
    (folder,) = world.run.glob("iter_*")
    (path, *_) = sorted(folder.glob(name))
    path.write_bytes(payload)
    return world.resume()


def as_torch_zip(payload):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def as_weights(world, payload):
    (world.hf / "model.safetensors").unlink()
    (world.hf / "pytorch_model.bin").write_bytes(as_torch_zip(payload))
    return world.from_hf()


def as_cached_tokens(world, payload):
    """Every array of the cache that a clean start made."""
    for path in (world.folder / "cache").rglob("*.npy"):
        with open(path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": (1,)})
            file.write(payload)
    return world.resume()


def template_file(world, text):
    (world.hf / "chat_template.jinja").write_text(text)
    return world.from_hf()


def template_in_configuration(world, text):
    edit(world.hf / "tokenizer_config.json", lambda data: data.update(chat_template=text))
    return world.from_hf()


def named_templates(world, text):
    edit(
        world.hf / "tokenizer_config.json",
        lambda data: data.update(chat_template=[{"name": "default", "template": text}]),
    )
    return world.from_hf()


def yaml_value(world, text):
    (world.folder / "c.yaml").write_text(f"lr: {text}\n")
    return [*world.resume(), "--config", str(world.folder / "c.yaml")]


def yaml_of_the_run(world, text):
    path = world.run / "config.yaml"
    path.write_text(path.read_text() + f"extra: {text}\n")
    return [*world.resume(), "--config", str(path)]


def code_beside(world, name, auto_map):
    for stem in ("hostile", "__init__", "sitecustomize", "conftest", "tokenization_hostile", "modeling_hostile"):
        (world.hf / f"{stem}.py").write_text(CODE.format(canary=str(world.canary)))
    edit(world.hf / name, lambda data: data.update(auto_map=auto_map, custom_generate="hostile"))
    return world.from_hf()


def cases():
    """(name, world -> command line)."""
    for name, payload in PICKLES.items():
        for file in (".metadata", "common.pt", "*.distcp", "train_state.json", "metadata.json"):
            for wrap in (bytes, as_torch_zip) if file in ("common.pt", "*.distcp") else (bytes,):
                yield (
                    f"{name} in {file} {wrap.__name__}",
                    lambda world, file=file, payload=payload, wrap=wrap: in_checkpoint(
                        world, file, wrap(payload(world.canary))
                    ),
                )
        yield f"{name} as weights", lambda world, payload=payload: as_weights(world, payload(world.canary))
        yield f"{name} in the cache", lambda world, payload=payload: as_cached_tokens(world, payload(world.canary))
    for place in (template_file, template_in_configuration, named_templates):
        for name, text in TEMPLATES.items():
            yield (
                f"{name}, {place.__name__}",
                lambda world, place=place, text=text: place(world, text.replace("CANARY", str(world.canary))),
            )
    for place in (yaml_value, yaml_of_the_run):
        for name, text in YAML_TAGS.items():
            yield (
                f"{name}, {place.__name__}",
                lambda world, place=place, text=text: place(world, text.replace("CANARY", str(world.canary))),
            )
    for name, auto_map in AUTO_MAPS.items():
        yield f"code by {name}", lambda world, name=name, auto_map=auto_map: code_beside(world, name, auto_map)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A model folder, and a run with a checkpoint."""
    folder = tmp_path_factory.mktemp("originals")
    write_rows(folder / "train.jsonl")
    hf = random_model(folder / "hf", "llama", tied=True)
    status, _, err = run_ranks(1, start_each, [flags(folder, save=folder / "run")])[0][0]
    assert status == 0, err
    return hf, folder / "run"


def test_there_are_a_hundred_and_more():
    names = [name for name, _ in cases()]
    assert len(names) == len(set(names)) >= 100


def test_nothing_is_executed(originals, tmp_path):
    chosen = list(cases())
    chosen = random.Random(0).sample(chosen, campaigns.cases(whole=len(chosen), part=20))
    worlds, words = [], []
    for number, (name, put) in enumerate(chosen):
        (tmp_path / str(number)).mkdir()
        world = World(tmp_path / str(number), *originals)
        shutil.copytree(originals[1].parent / "cache", world.folder / "cache")
        worlds.append((name, world))
        words.append(put(world))
    refused = 0
    for (name, world), (status, out, err) in zip(worlds, run_ranks(1, start_each, words, timeout=1800)[0]):
        assert not world.canary.exists(), name
        assert "Traceback" not in out + err and status in (0, 2), (name, err)
        refused += status == 2
    assert refused > 0.6 * len(chosen)
    campaigns.tell("hostile files", len(chosen), f"0 executions, {refused} refused in one line")


def prepare(words):
    from tests.helpers.captured import run_captured

    return run_captured(command_main("prepare_data", words))


@pytest.mark.parametrize("name", PICKLES)
def test_hidden_tests_of_a_benchmark(tmp_path, name):
    canary = tmp_path / "canary"
    payload = base64.b64encode(zlib.compress(PICKLES[name](canary))).decode()
    row = {
        "question_content": "Add.", "question_id": "1", "question_title": "t", "platform": "atcoder",
        "starter_code": "", "difficulty": "easy", "contest_id": "c", "contest_date": "2025-01-01T00:00:00",
        "metadata": "{}", "public_test_cases": "[]", "private_test_cases": payload,
    }  # fmt: skip
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    files = [str(tmp_path / "test.jsonl"), "--output", str(tmp_path / "o.jsonl")]
    words = ["benchmark", "--format", "livecodebench", *files]
    status, out, err = run_ranks(1, prepare, words)[0]
    assert status == 2 and "Traceback" not in out + err and not canary.exists(), (status, err)


def test_the_canary_is_alive(tmp_path):
    """What is refused above does run where it is opened the careless way."""
    for number, (name, payload) in enumerate(PICKLES.items()):
        canary = tmp_path / str(number)
        if name not in ("getattr of a module", "second pickle"):
            pickle.loads(payload(canary))  # noqa: S301 - to see that it would have
            assert canary.exists(), name
    canary = tmp_path / "yaml"
    yaml.unsafe_load(YAML_TAGS["apply"].replace("CANARY", str(canary)))
    assert canary.exists()
