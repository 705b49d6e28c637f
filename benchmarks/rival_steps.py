"""Two other ways to take the same step, for bench_step.py: dense autograd, and EleutherAI's formulation.

Both work on the numbers of a CrossLayerTranscoder (its parameters' memory is shared, and its optimiser's may
be, so neither needs room of its own), with top-k activations and the cache's variance; both leave gradients
for torch's fused Adam.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from clt.train.optimizer import Optimizer
from clt.train.reader import Batch
from clt.train.transcoder import CrossLayerTranscoder


class Leaves:
    """A model's parameters as leaves of their own, one a (source, target) pair: what is best for autograd."""

    def __init__(self, model: CrossLayerTranscoder) -> None:
        self.model, self.shape = model, model.shape
        self.W_enc, self.b_enc = _leaves(model.W_enc), _leaves(model.b_enc)
        self.W_dec = [_leaves(list(weight)) for weight in model.W_dec]  # [target][place of source]
        self.b_dec = _leaves(model.b_dec)
        self.all = [*self.W_enc, *self.b_enc, *(w for ws in self.W_dec for w in ws), *self.b_dec]
        self.adam = torch.optim.Adam(self.all, lr=1e-4, fused=True)

    def share_state(self, optimizer: Optimizer) -> None:
        """Keep Adam's moments where the optimiser of the model does: there is room for one of them."""
        matrices = [("W_enc", layer, ...) for layer in range(self.shape.n_layers)]
        biases = [("b_enc", layer, ...) for layer in range(self.shape.n_layers)]
        pairs = [("W_dec", t, place) for t, weights in enumerate(self.W_dec) for place in range(len(weights))]
        outputs = [("b_dec", layer, ...) for layer in range(self.shape.n_layers)]
        for leaf, (name, layer, slot) in zip(self.all, [*matrices, *biases, *pairs, *outputs], strict=True):
            moments = optimizer.state_of(name, layer)
            shared = {moment: moments[moment][slot] for moment in ("exp_avg", "exp_avg_sq")}
            self.adam.state[leaf] = {"step": torch.zeros(()), **shared}

    def values(self, batch: Batch, site: str, layer: int) -> Tensor:
        """Standardised (token, d_model)."""
        standardiser = self.model.inputs if site == "mlp_in" else self.model.outputs
        mean = standardiser.mean
        return standardiser.apply_to(batch.values(site, layer, mean.device, mean.dtype), layer)

    def gradients(self) -> list[Tensor]:
        """In the order of the model's: W_enc, b_enc, W_dec, b_dec, each by layer."""
        decoders = [torch.stack([_gradient(w) for w in pair]) for pair in self.W_dec]
        encoders = [_gradient(p) for p in (*self.W_enc, *self.b_enc)]
        return [*encoders, *decoders, *(_gradient(b) for b in self.b_dec)]

    def update(self) -> None:
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)


def dense_step(leaves: Leaves, batch: Batch) -> Tensor:
    """The definition, written out: dense activations, one graph, one backward. The loss."""
    shape = leaves.shape
    activations = []
    for s in range(shape.n_layers):
        pre = torch.relu(F.linear(leaves.values(batch, "mlp_in", s), leaves.W_enc[s], leaves.b_enc[s]))
        values, indices = pre.topk(shape.k, dim=1, sorted=False)
        activations.append(torch.zeros_like(pre).scatter(1, indices, values))
    loss = leaves.b_dec[0].new_zeros(())
    for t in range(shape.n_layers):
        predicted = leaves.b_dec[t]
        for place, s in enumerate(shape.sources(t)):
            predicted = predicted + activations[s] @ leaves.W_dec[t][place]
        truth = leaves.values(batch, "mlp_out", t)
        loss = loss + (predicted - truth).square().sum() / truth.numel()
    loss.backward()
    return loss.detach()


def eleuther_step(leaves: Leaves, batch: Batch) -> Tensor:
    """clt-training's order: codes become leaves, each target goes backward as soon as it is decoded, and each
    source gets one sparse encoder backward after its last target. The loss.
    """
    shape = leaves.shape
    inputs: dict[int, Tensor] = {}
    codes: dict[int, tuple[Tensor, Tensor]] = {}
    total = leaves.b_dec[0].new_zeros(())
    for t in range(shape.n_layers):
        inputs[t] = leaves.values(batch, "mlp_in", t)
        with torch.no_grad():
            pre = torch.relu(F.linear(inputs[t], leaves.W_enc[t], leaves.b_enc[t]))
            values, indices = pre.topk(shape.k, dim=1, sorted=False)
            del pre
        codes[t] = (values.requires_grad_(), indices)
        predicted = leaves.b_dec[t]
        for place, s in enumerate(shape.sources(t)):
            values, indices = codes[s]
            weight = leaves.W_dec[t][place]
            predicted = predicted + F.embedding_bag(indices, weight, per_sample_weights=values, mode="sum")
        truth = leaves.values(batch, "mlp_out", t)
        fvu = (predicted - truth).square().sum() / truth.numel()
        fvu.backward()
        total += fvu.detach()
        for s in [s for s in codes if s + shape.n_targets == t + 1 or t + 1 == shape.n_layers]:
            _encoder_backward(leaves, s, inputs.pop(s), *codes.pop(s))
    return total


def _encoder_backward(leaves: Leaves, source: int, inputs: Tensor, values: Tensor, indices: Tensor) -> None:
    """Weight and bias gradients of one encoder: a sparse matrix in COO form times the inputs."""
    weight, bias = leaves.W_enc[source], leaves.b_enc[source]
    assert values.grad is not None
    grad = (values.grad * (values > 0)).flatten().detach()
    tokens = torch.arange(len(inputs), device=inputs.device).repeat_interleave(values.shape[1])
    places = torch.stack([indices.flatten(), tokens])
    size = (len(weight), len(inputs))
    matrix = torch.sparse_coo_tensor(places, grad, size, check_invariants=False)
    weight.grad = torch.sparse.mm(matrix, inputs)
    bias.grad = torch.zeros_like(bias).index_add_(0, indices.flatten(), grad)


def _leaves(parameters: "list[Tensor] | torch.nn.ParameterList") -> list[Tensor]:
    return [p.detach().requires_grad_() for p in parameters]


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad
