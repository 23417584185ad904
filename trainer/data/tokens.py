"""Files of tokens, mapped: which they are, of what dtype, where in them the tokens stand, and what is held out.

bare tokens      of `data.dtype`; where Megatron's index lies beside them (x.idx beside x.bin), of the dtype and in the documents that
                 it names (`megatron.py`)
x.npy            a 1-D array of integers
llm.c's          1,024 bytes of header, then tokens of 16 or 32 bits
a folder         with meta.json: a corpus that Rowwise wrote (`corpus.py`)
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rowwise.trainer.data.config import Tokens
from rowwise.trainer.data.corpus import (
    Store,
    TokenStream,
    is_corpus,
    map_tokens,
    open_store,
    split_stream,
    with_documents,
)
from rowwise.trainer.data.documents import Found, find_files
from rowwise.trainer.data.earlier import record_of_earlier
from rowwise.trainer.data.integrity import DataDamaged
from rowwise.trainer.data.kinds import LLM_C, NPY, check_tokens
from rowwise.trainer.data.megatron import index_of

_DEFAULT_DTYPE = "uint16"
_LLM_C_HEAD, _LLM_C_DTYPES = 1024, {20240520: "uint16", 20240801: "uint32"}


def token_files(config: Tokens) -> Found:
    """Returns the files and corpus folders that `data.files` names. Raises ValueError."""
    patterns = [config.files] if isinstance(config.files, str) else config.files
    found = Found()
    for pattern in patterns or [""]:
        path = Path(pattern).expanduser()
        if is_corpus(path):
            for key in ("dtype", "separator"):
                if (given := getattr(config, key)) is not None:
                    raise ValueError(
                        f"data.{key}={given} with {pattern}, a corpus folder, which says itself what it holds; "
                        f"leave data.{key}=null"
                    )
            found += Found((path,))
        else:
            found += find_files(pattern, config.ENDINGS)
    for path in found.files:
        if path.is_file() and is_corpus(path.parent):
            raise ValueError(f"{path} is a part of a corpus folder; give data.files={path.parent}")
    return found


def open_folder(path: Path) -> Store:
    """Opens a corpus folder that Rowwise wrote, in this release or an earlier one, compared with its record. Raises
    DataDamaged."""
    try:
        store = open_store(path, record_of_earlier(path))
        for stream in store.streams():
            most = token_range(stream.tokens)[1] if len(stream.tokens) else 0
            if most >= store.record.vocab_size:
                raise DataDamaged(
                    f"{path} holds the token {most}, and its record says that there are {store.record.vocab_size}"
                )
    except DataDamaged as damage:
        raise DataDamaged(
            f"{damage}; give data.files a folder as it was written: the one that data=text or data=hf with data.cache_dir makes"
        ) from None
    return store


def open_tokens(path: Path, config: Tokens) -> TokenStream:
    """Opens the tokens of a file, with documents that end with `data.separator`, or as an index beside it has them. Raises ValueError
    for what holds none."""
    index = index_of(path)
    if config.mask_documents and config.separator is None and index is None:
        raise ValueError(
            "data.mask_documents=true needs data.separator, the token that ends a document in a raw token file, or Megatron's index "
            "beside it"
        )
    dtype = (index.dtype if index is not None else config.dtype) or _DEFAULT_DTYPE
    kind = check_tokens(path, np.dtype(dtype).itemsize)
    if kind == NPY:
        tokens = _array(path)
    elif kind == LLM_C:
        tokens = _behind_header(path)
    else:
        tokens = _bare(path, dtype)
    if config.dtype is not None and tokens.dtype.newbyteorder() != np.dtype(config.dtype).newbyteorder():
        said = "its header says" if kind else "the index beside it says"
        raise ValueError(
            f"data.dtype={config.dtype}, but {path} holds {tokens.dtype}, as {said}; leave data.dtype=null"
        )
    if not len(tokens):
        raise ValueError(f"{path} has no tokens; give other data.files")
    if index is not None and config.separator is None:
        return TokenStream(tokens, index.documents)
    return with_documents(tokens, config.separator)


def split_streams(
    streams: Sequence[TokenStream], holdout: float, seq_len: int
) -> tuple[list[TokenStream], list[TokenStream]]:
    """Returns (training, held-out): of the share `holdout` of all windows each stream gives its part, from its end; at least one
    of all, where some stream has two."""
    windows = [stream.windows(seq_len) for stream in streams]
    # Rounded together: shares of many short files would each round to none, or to all.
    ends = np.rint(np.cumsum(windows) * holdout).astype(int)
    held = np.diff(ends, prepend=0)
    if holdout > 0 and not held.any() and (long := [n for n, count in enumerate(windows) if count > 1]):
        held[long[-1]] = 1
    pairs = [split_stream(stream, int(count), seq_len) for stream, count in zip(streams, held, strict=True)]
    return [train for train, _ in pairs], [holdout_ for _, holdout_ in pairs]


def token_range(tokens: np.ndarray, window: int = 1 << 24) -> tuple[int, int]:
    """Returns the smallest and the largest token: of all up to 64 windows, else of 64 windows spread over them, so that a file of
    terabytes opens at once."""
    n = len(tokens)
    starts = range(0, n, window) if n <= 64 * window else range(0, n - window, (n - window) // 63)
    windows = [tokens[s : s + window] for s in starts]
    return min(int(w.min()) for w in windows), max(int(w.max()) for w in windows)


def _bare(path: Path, dtype: str) -> np.ndarray:
    size = path.stat().st_size
    if size == 0 or size % np.dtype(dtype).itemsize:
        raise ValueError(f"{path} has {size} bytes, which is no number of {dtype} tokens above 0; set data.dtype")
    return map_tokens(path, dtype)


def _array(path: Path) -> np.ndarray:
    try:
        # The header is a literal of Python, read as one; objects are not loaded.
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # of the many that a wrong header raises
        raise ValueError(f"{path} cannot be read as .npy ({str(error).splitlines()[0]}); write it again") from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"{path} is an array of {tokens.dtype} of shape {tokens.shape}, and tokens are 1-D integers; save it again as "
            "array.reshape(-1).astype(numpy.uint16), or what holds its largest token"
        )
    return tokens


def _behind_header(path: Path) -> np.ndarray:
    magic, _, count = (int(number) for number in np.fromfile(path, dtype="<i4", count=3))
    tokens = map_tokens(path, _LLM_C_DTYPES[magic], _LLM_C_HEAD)
    if len(tokens) != count:
        raise ValueError(f"{path} has {len(tokens)} tokens, and its header says {count}; write it again")
    return tokens
