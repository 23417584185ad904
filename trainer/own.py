"""What a run of a user's own model does not go with."""

from rowwise.conf.refusal import Refusal, Refusals
from rowwise.kernels.spec import Specs
from rowwise.optim.sparse.config import NM, sparse_layers
from rowwise.trainer.adapters.specs import is_adapted
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.data.config import DataConfig, Mixture
from rowwise.trainer.models.decoder import on_meta
from rowwise.trainer.models.made import sees
from rowwise.trainer.models.own import linear_weights

OWN: Refusals = (
    Refusal(
        ("model.own", "parallel.ulysses", "parallel.ring"),
        lambda run: run.parallel.ulysses * run.parallel.ring > 1 and sees(run.model) != "attend",
        "model.own={model.own} with parallel.ulysses={parallel.ulysses} parallel.ring={parallel.ring}: its layers look at other "
        "tokens by other means than attend (SEES), so that no ranks share a sequence; give 1 to both",
    ),
    Refusal(
        ("model.own", "data.mask_documents"),
        lambda run: keeps_documents(run.data) and sees(run.model) == "sequence",
        "model.own={model.own} with data={data.name}, whose documents are kept apart: its layers look across them (SEES); give "
        "data.mask_documents=false where the data has that key, or a model that keeps to documents",
    ),
    Refusal(
        ("model.own", "parallel.backend"),
        lambda run: run.model.own is not None and run.parallel.backend != "torch",
        "model.own={model.own} with parallel.backend={parallel.backend}: that is not tried with models of one's own; give "
        "parallel.backend=torch",
    ),
)


def keeps_documents(data: DataConfig) -> bool:
    """Says whether tokens of a source, or of one of a mixture, see their own document alone."""
    if isinstance(data, Mixture):
        return any(part.data.mask_documents for part in data.sources)
    return data.mask_documents


def check_linear(config: TrainConfig, specs: Specs) -> None:
    """Refuses adapters, n:m masks and codes of hidden matrices that are no weights of plain linear layers, for which others stand in.
    `specs`: of the run. Raises ValueError."""
    if config.model.own is None:
        return
    asked = {
        f"adapter={config.adapter.name}, adapter.layers": [
            n for n, s in specs.items() if is_adapted(n, s, config.adapter)
        ],
        f"model.frozen_dtype={config.model.frozen_dtype}": [n for n, s in specs.items() if s.kept is not None],
        "sparsity=nm, sparsity.layers": sparse_layers(config.sparsity, specs)
        if isinstance(config.sparsity, NM)
        else [],
    }
    linear = linear_weights(on_meta(config.model)) if any(asked.values()) else frozenset()
    for what, names in asked.items():
        if other := [name for name in names if name not in linear]:
            raise ValueError(
                f"{what}: {other[0]} of model.own={config.model.own} is not the weight of an nn.Linear; leave it out"
            )
