"""Checkpoints that a stranger made: their metadata names functions, their files hold more than tensors. None of it runs."""

import copyreg
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from parity import small_config, with_layout
from rowwise.launch import export
from rowwise.trainer.files import fingerprint
from rowwise.trainer.manifest import complete_checkpoints, damage, file_facts, read_manifest
from rowwise.trainer.metadata import METADATA, Reader, read_metadata
from rowwise.trainer.resume import find_resume
from runs import run_train

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call

    def __call__(self):
        raise AssertionError("made to be pickled")


@pytest.fixture
def proof(tmp_path) -> Path:
    """What every one of the malicious would make."""
    return tmp_path / "it-ran"


def in_state(value) -> Metadata:
    return Metadata({"w": value}, storage_data={})


def build_on_a_class() -> bytes:
    """Gives torch's class another `__setstate__`, to be called by whatever is read next."""
    push = b"ctorch.distributed.checkpoint.metadata\nTensorProperties\n"
    return b"\x80\x04" + push + b"N}\x8c\x0c__setstate__" + b"ctorch.serialization\n_get_layout\ns\x86b."


MALICIOUS = {
    "a command": lambda p: Calls(os.system, f"touch {p}"),
    "nested": lambda p: in_state([{"deep": (Calls(os.system, f"touch {p}"),)}]),
    "as a place": lambda p: Metadata({}, storage_data={MetadataIndex("w"): Calls(os.system, f"touch {p}")}),
    "builtins": lambda p: Calls(eval, f"open({str(p)!r}, 'w')"),
    "getattr": lambda p: Calls(Calls(getattr, Calls(__import__, "os"), "system"), f"touch {p}"),
    "torch.load": lambda p: Calls(torch.load, str(p)),
    "torch's storages": lambda p: Calls(torch.storage._load_from_bytes, pickle.dumps(Calls(os.system, f"touch {p}"))),
    "copyreg": lambda p: Calls(copyreg._reconstructor, Calls, object, None),
    "pathlib": lambda p: Calls(Path.touch, p),
    "an object beside the tensors": lambda p: in_state(BytesStorageMetadata()),
}
RAW = {
    "a name with dots": b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\x09os.system\x93.",
    "Python 2's names": b"cos\nsystem\n(S'true'\ntR.",
    "a class that is changed": build_on_a_class(),
    "an extension of copyreg": b"\x80\x04\x82\x01.",
    "an object by its id": b"\x80\x04\x8c\x01aQ.",
    "half a pickle": pickle.dumps(Metadata({}))[:-9],
    "a length that cannot be": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "no pickle": b"hello",
    "nothing": b"",
    "a number": pickle.dumps(7),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A checkpoint in torch's format, as any release writes it."""
    folder = tmp_path_factory.mktemp("saved")
    tensors = {
        "w": torch.arange(6.0),
        "half": torch.ones(2, 3, dtype=torch.bfloat16),
        "bytes": torch.ones(4, dtype=torch.uint8),
    }
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return folder


def test_what_torch_writes_is_read(saved):
    ours, theirs = read_metadata(saved), dcp.FileSystemReader(saved).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata and ours.storage_data == theirs.storage_data
    tensors = {"w": torch.zeros(6)}
    dcp.load(tensors, storage_reader=Reader(saved), no_dist=True)
    assert torch.equal(tensors["w"], torch.arange(6.0))


@pytest.mark.parametrize("name", [*MALICIOUS, *RAW])
def test_no_metadata_runs_code(tmp_path, proof, name):
    content = RAW[name] if name in RAW else pickle.dumps(MALICIOUS[name](proof))
    (tmp_path / METADATA).write_bytes(content)
    with pytest.raises(ValueError) as refusal:
        read_metadata(tmp_path)
    said = str(refusal.value)
    assert "\n" not in said and said.startswith(f"{tmp_path / METADATA} ") and len(said) < 400
    with pytest.raises(dcp.api.CheckpointException):
        dcp.load({"w": torch.zeros(6)}, storage_reader=Reader(tmp_path), no_dist=True)
    assert not proof.exists()


def test_the_refusal_names_what_would_run(tmp_path, proof):
    (tmp_path / METADATA).write_bytes(pickle.dumps(MALICIOUS["a command"](proof)))
    with pytest.raises(
        ValueError, match=r"names posix.system, which no checkpoint needs: it may have been made to run code"
    ):
        read_metadata(tmp_path)


def test_no_metadata_leads_elsewhere(saved, tmp_path):
    metadata = read_metadata(saved)
    index, info = next(iter(metadata.storage_data.items()))
    metadata.storage_data[index] = replace(info, relative_path="../../etc/passwd")
    (tmp_path / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"leads out of its folder, to \.\./\.\./etc/passwd"):
        read_metadata(tmp_path)


def test_a_tensor_that_is_none_is_not_run(saved, tmp_path, proof):
    """torch reads tensors with `weights_only`."""
    metadata = read_metadata(saved)
    torch.save(Calls(os.system, f"touch {proof}"), tmp_path / "evil")
    index = next(index for index in metadata.storage_data if index.fqn == "w")
    info = replace(
        metadata.storage_data[index], relative_path="evil", offset=0, length=(tmp_path / "evil").stat().st_size
    )
    metadata.storage_data[index] = info
    (tmp_path / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(dcp.api.CheckpointException, match=r"[Ww]eights.only"):
        dcp.load({"w": torch.zeros(6)}, storage_reader=Reader(tmp_path), no_dist=True)
    assert not proof.exists()


def test_a_run_and_an_export_refuse_it_in_one_line(ranks, tmp_path, proof, capsys):
    """Its manifest agrees with it: who can change the one can change the other."""
    config = with_layout(small_config(tmp_path, "steps=1", "precision=fp32"), 1)
    ranks.run(run_train, 1, config)
    checkpoint = complete_checkpoints(Path(config.run_dir) / "checkpoints")[0]
    manifest = read_manifest(checkpoint)
    assert find_resume(config, manifest["data"]["the data"]) == [checkpoint]

    (checkpoint / METADATA).write_bytes(pickle.dumps(MALICIOUS["a command"](proof)))
    assert damage(checkpoint, manifest["files"].items())
    assert find_resume(config, manifest["data"]["the data"]) == [checkpoint], "damaged: named and passed over later"
    manifest["files"][METADATA] = file_facts(checkpoint / METADATA)
    manifest_json = {**manifest, "checksum": fingerprint(manifest)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest_json))
    capsys.readouterr()
    with pytest.raises(ValueError, match=r"names posix\.system"):
        find_resume(config, manifest["data"]["the data"])
    assert export.main([f"run={config.run_dir}", f"to={tmp_path}/to"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("refused: ") and said.count("\n") == 1 and "posix.system" in said
    assert not proof.exists()
