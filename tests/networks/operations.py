"""What random networks are made of: lines of source for `__init__` and for `forward`.

In a network h is [B, 4] ("vector") or [B, 3, 4] ("positions") before and after each operation;
{i} is the operation's own number and {j} that of an earlier dense layer `self.l{j}`, 4 to 4.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Operation:
    """One piece of a network.

    Args:
        name: for reports.
        made: lines of `__init__`.
        done: lines of `forward`.
        on: "any", "vector" or "positions".
        makes: whether it makes a dense layer self.l{i}.
        random: whether a forward draws random numbers or counts its calls, so that two differ.
    """

    name: str
    made: str
    done: str
    on: str = "any"
    makes: bool = False
    random: bool = False


_DENSE = "self.l{i} = nn.Linear(4, 4)"
_CALL = "h = torch.tanh(self.l{i}(h))"
_NORM = "lambda g: g / (g.norm() + 0.1)"


def _dense(name: str, done: str, made: str = "", **options: bool | str) -> Operation:
    """An operation with a dense layer of its own."""
    made = _DENSE + ("\n" + made if made else "")
    return Operation(name, made, done, makes=True, **options)  # type: ignore[arg-type]


# Layers used once, as clip-in-backward wants them.
ONCE = (
    _dense("dense", _CALL),
    _dense("dense by keyword", "h = torch.tanh(self.l{i}(input=h))"),
    _dense("residual", "h = h + torch.tanh(self.l{i}(h))"),
    _dense("direct forward", "h = torch.tanh(self.l{i}.forward(h))"),
    _dense("in place", "h = self.l{i}(h)\nh *= 2.0\nh.tanh_()"),
    _dense("in place on a part", "h = self.l{i}(h)\nh[..., 0] = 0.5"),
    _dense("unused layer", "pass"),
    _dense("used without effect", "self.l{i}(h)"),
    _dense("detached before", "h = h + torch.tanh(self.l{i}(h.detach()))"),
    _dense("detached beside", "h = 0.5 * h.detach() + torch.tanh(self.l{i}(h))"),
    _dense("where the record says", "h = torch.where(h[..., :1] > 0, torch.tanh(self.l{i}(h)), h)"),
    _dense("frozen", _CALL, "self.l{i}.requires_grad_(False)"),
    _dense("frozen weight", _CALL, "self.l{i}.weight.requires_grad_(False)"),
    _dense("pre-hook", _CALL, "self.l{i}.register_forward_pre_hook(lambda m, a: (2 * a[0],))"),
    _dense("forward hook", _CALL, "self.l{i}.register_forward_hook(lambda m, a, o: o.clamp(-1, 1))"),
    _dense("checkpointed", "h = checkpoint(lambda z: torch.tanh(self.l{i}(z)), h, use_reentrant=False)"),
    _dense("gradient reversed", "h = Reverse.apply(torch.tanh(self.l{i}(h)))"),
    _dense("gradient doubled by a hook", "h = torch.tanh(self.l{i}(h))\nif h.requires_grad:\n    h.register_hook(lambda g: 2 * g)"),
    _dense("shape of a weight", "h = torch.tanh(self.l{i}(h)) / self.l{i}.weight.shape[0] ** 0.5"),
    Operation("LayerNorm", "self.n{i} = nn.LayerNorm(4)", "h = self.n{i}(h)"),
    Operation("RMSNorm", "self.n{i} = nn.RMSNorm(4)", "h = self.n{i}(h)"),
    Operation("GroupNorm", "self.n{i} = nn.GroupNorm(1, 4)", "h = self.n{i}(h + 1)", "vector"),
    Operation("GroupNorm of positions", "self.n{i} = nn.GroupNorm(2, 4)", "h = self.n{i}(h.transpose(1, 2)).transpose(1, 2)", "positions"),
    Operation("InstanceNorm", "self.n{i} = nn.InstanceNorm1d(4, affine=True)", "h = self.n{i}(h.transpose(1, 2)).transpose(1, 2)", "positions"),
    Operation("Conv1d", "self.c{i} = nn.Conv1d(4, 4, 3, padding=1)", "h = torch.tanh(self.c{i}(h.transpose(1, 2))).transpose(1, 2)", "positions"),
    Operation("Bias", "self.b{i} = Bias(4)", "h = self.b{i}(h)"),
    Operation("Embedding", "self.e{i} = nn.Embedding(2, 4)", "h = h + self.e{i}((h.detach()[..., 0] > 0).long())"),
    Operation("positions each", "self.e{i} = nn.Embedding(3, 4)", "h = h + self.e{i}(torch.arange(h.shape[1]).expand(h.shape[:2]))", "positions"),
)  # fmt: skip

# Layers used several times, parameters used beside their layer, rows that are not the records.
OTHERWISE = (
    Operation("reused", "", "h = torch.tanh(self.l{j}(h))"),
    Operation("reused without gradient", "", "with torch.no_grad():\n    s = self.l{j}(h)\nh = h + 0.5 * s"),
    Operation("reused, direct forward", "", "h = torch.tanh(self.l{j}.forward(h))"),
    _dense("three times", "for _ in range(3):\n    h = torch.tanh(self.l{i}(h))"),
    _dense("both signs", "h = torch.tanh(self.l{i}(h) - self.l{i}(-h))"),
    _dense("random depth", "for _ in range(int(torch.randint(0, 4, ()))):\n    h = torch.tanh(self.l{i}(h))", random=True),
    _dense("depth by calls", "self.calls{i} += 1\nfor _ in range(1 + self.calls{i} % 2):\n    h = torch.tanh(self.l{i}(h))", "self.calls{i} = 0", random=True),
    Operation("tied", _DENSE + "\nself.l{i}.weight = self.l{j}.weight", _CALL),
    Operation("tied both", _DENSE + "\nself.l{i}.weight, self.l{i}.bias = self.l{j}.weight, self.l{j}.bias", _CALL),
    Operation("two names", "self.l{i} = self.l{j}", _CALL),
    Operation("layer in a list", "self.kept{i} = [self.l{j}]", "h = torch.tanh(self.kept{i}[0](h))"),
    Operation("bound method kept", "self.kept{i} = self.l{j}.forward", "h = torch.tanh(self.kept{i}(h))"),
    Operation("weight by attribute", "", "h = h + 0.5 * h @ self.l{j}.weight"),
    Operation("weight by F.linear", "", "h = torch.tanh(F.linear(h, self.l{j}.weight, self.l{j}.bias))"),
    Operation("weight in a list", "self.kept{i} = [self.l{j}.weight]", "h = h + 0.5 * h @ self.kept{i}[0]"),
    Operation("weight in a closure", "w = self.l{j}.weight\nself.kept{i} = lambda z: z @ w", "h = h + 0.5 * self.kept{i}(h)"),
    Operation("parameters()", "", "h = h * (1 + sum(p.square().mean() for p in self.l{j}.parameters()))"),
    Operation("named_parameters()", "", "h = h + 0.5 * h @ dict(self.named_parameters())['l{j}.weight']"),
    Operation("weight detached", "", "h = h + 0.5 * h @ self.l{j}.weight.detach()"),
    Operation("weight's norm", "", "h = h / (1 + self.l{j}.weight.norm())"),
    _dense("nn.Linear.forward", "h = torch.tanh(nn.Linear.forward(self.l{i}, h))"),
    _dense("functional_call", "h = torch.tanh(functional_call(self.l{i}, dict(self.l{i}.named_parameters()), (h,)))"),
    _dense("hook calls it again", _CALL, "self.l{i}.register_forward_hook(lambda m, a, o: o + m.forward(a[0].square()))"),
    _dense("hook uses its weight", _CALL, "self.l{i}.register_forward_hook(lambda m, a, o: o + a[0] @ m.weight)"),
    _dense("gradient inside", "z = h.detach().requires_grad_()\nwith torch.enable_grad():\n    g = torch.autograd.grad(torch.tanh(self.l{i}(z)).sum(), z, create_graph=True)[0]\nh = h + g"),
    _dense("hook on the weight", _CALL, "self.l{i}.weight.register_hook(lambda g: 3 * g)"),
    Operation("subclass", "self.l{i} = Scaled(4, 4)", _CALL, makes=True),
    Operation("weight_norm", "self.w{i} = parametrizations.weight_norm(nn.Linear(4, 4))", "h = torch.tanh(self.w{i}(h))"),
    Operation("part used twice", "self.p{i} = Part()", "h = self.p{i}(self.p{i}(h))"),
    Operation("parameter [4]", "self.b{i} = nn.Parameter(torch.zeros(4))", "h = h + self.b{i}"),
    Operation("parameter 0-d", "self.b{i} = nn.Parameter(torch.tensor(0.7))", "h = h * self.b{i}"),
    Operation("parameter [1, 4]", "self.b{i} = nn.Parameter(torch.ones(1, 4))", "h = h * self.b{i}"),
    Operation("parameter [2, 2]", "self.b{i} = nn.Parameter(torch.ones(2, 2))", "h = h * self.b{i}.reshape(-1)"),
    Operation("parameter [0, 4]", "self.b{i} = nn.Parameter(torch.ones(0, 4))", "h = h + self.b{i}.sum(0)"),
    Operation("unused parameter", "self.b{i} = nn.Parameter(torch.ones(3))", "pass"),
    Operation("ParameterList", "self.b{i} = nn.ParameterList([torch.ones(4), torch.tensor(0.1)])", "h = h * self.b{i}[0] + self.b{i}[1]"),
    Operation("low rank", "self.a{i}, self.b{i} = nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(2, 4))", "h = torch.tanh(h @ self.a{i} @ self.b{i})"),
    Operation("PReLU", "self.a{i} = nn.PReLU()", "h = self.a{i}(h)"),
    Operation("positions at once", "self.e{i} = nn.Embedding(3, 4)", "h = h + self.e{i}(torch.arange(h.shape[1]))", "positions"),
    _dense("one row", "h = torch.tanh(self.l{i}(h.unsqueeze(0))).squeeze(0)"),
    _dense("positions first", "h = torch.tanh(self.l{i}(h.transpose(0, 1))).transpose(0, 1)", on="positions"),
    _dense("positions as rows", "h = torch.tanh(self.l{i}(h.reshape(-1, 4))).reshape(h.shape)", on="positions"),
    Operation("halves as rows", "self.q{i} = nn.Linear(2, 2)", "h = torch.tanh(self.q{i}(h.reshape(-1, 2))).reshape(h.shape)"),
    _dense("records turned round", "h = torch.tanh(self.l{i}(h.flip(0))).flip(0)"),
    _dense("records sorted", "o = h.detach().flatten(1).sum(1).argsort()\nh = torch.tanh(self.l{i}(h[o]))[o.argsort()]"),
    _dense("records twice", "h = torch.tanh(self.l{i}(torch.cat([h, h])))[: len(h)]"),
    _dense("records in pairs", "h = torch.cat([torch.tanh(self.l{i}(z)) for z in h.split(2)])"),
    _dense("record by record", "h = torch.stack([torch.tanh(self.l{i}(z)) for z in h])"),
    _dense("routed records", "m = h.detach().flatten(1).sum(1) > 0\ns = torch.zeros_like(h)\ns[m] = torch.tanh(self.l{i}(h[m]))\nh = h + s"),
    _dense("to the longest record", "real = (x != 0).flatten(2).any(2) if x.dim() > 2 else x != 0\ns = torch.zeros_like(h[:, 0])\nfor t in range(int(real.sum(1).max())):\n    s = torch.where(real[:, t, None], torch.tanh(self.l{i}(h[:, t] + s)), s)\nh = h + s[:, None]", on="positions"),
    Operation("GRU", "self.r{i} = nn.GRU(4, 4, batch_first=True)", "h = self.r{i}(h)[0]", "positions"),
    Operation("LSTM", "self.r{i} = nn.LSTM(4, 4, batch_first=True)", "h = self.r{i}(h)[0]", "positions"),
    Operation("GRUCell", "self.r{i} = nn.GRUCell(4, 4)", "h = self.r{i}(h)", "vector"),
    Operation("attention", "self.a{i} = nn.MultiheadAttention(4, 2, batch_first=True)", "h = h + self.a{i}(h, h, h)[0]", "positions"),
    Operation("Dropout", "self.d{i} = nn.Dropout(0.3)", "h = self.d{i}(h)", random=True),
    _dense("stochastic depth", "if torch.rand(()) < 0.5:\n    h = h + torch.tanh(self.l{i}(h))", random=True),
)  # fmt: skip

# What no clipping of single records can bound, in the forward or in the backward pass alone.
MIXING = (
    Operation("centred", "", "h = h - h.mean(0)"),
    Operation("neighbour added", "", "h = h + 0.5 * h.roll(1, 0)"),
    Operation("norm of the batch", "", "h = h / (h.norm() + 1)"),
    Operation("softmax over records", "", "h = torch.softmax(h, 0)"),
    Operation("cumulative", "", "h = h.cumsum(0)"),
    Operation("sorted values", "", "h = h.sort(0).values"),
    Operation("batch mean, a little", "", "h = h + 0.05 * h.mean(0)"),
    Operation("size of the batch", "", "h = h + 0.3 * len(h)"),
    Operation("place in the batch", "self.e{i} = nn.Embedding(16, 4)", "h = h + self.e{i}(torch.arange(len(h))).reshape(len(h), *[1] * (h.dim() - 2), 4)"),
    _dense("depth by the maximum", "for _ in range(1 + int(x.abs().max() > 2)):\n    h = torch.tanh(self.l{i}(h))"),
    _dense("branch by the sum", "h = torch.tanh(self.l{i}(h)) if x.sum() > 0 else 2 * h"),
    _dense("branch by the first", "h = torch.tanh(self.l{i}(h)) if h.flatten()[0] > 0 else 2 * h"),
    Operation("Conv1d over records", "self.c{i} = nn.Conv1d(4, 4, 3, padding=1)", "h = torch.tanh(self.c{i}(h.T)).T", "vector"),
    Operation("GRU over records", "self.r{i} = nn.GRU(4, 4)", "h = self.r{i}(h)[0]"),
    Operation("attention over records", "self.a{i} = nn.MultiheadAttention(4, 2)", "h = h + self.a{i}(h, h, h)[0]"),
    Operation("BatchNorm", "self.n{i} = nn.BatchNorm1d(4)", "h = self.n{i}(h)", "vector"),
    Operation("batch_norm", "", "h = F.batch_norm(h, None, None, training=True) if len(h) > 1 else h", "vector"),
    Operation("statistics kept", "self.register_buffer('m{i}', torch.zeros(4))", "self.m{i} = 0.9 * self.m{i} + 0.1 * h.detach().reshape(-1, 4).mean(0)\nh = h + self.m{i}", random=True),
    Operation("centred, value put back", "", "h = h - h.mean(0) + h.mean(0).detach()"),
    Operation("gradient normalised, hook", "", f"if h.requires_grad:\n    h.register_hook({_NORM})"),
    Operation("gradient centred, hook", "", "h = h * 1.0\nif h.requires_grad:\n    h.register_hook(lambda g: g - g.mean(0))"),
    _dense("gradient normalised, module", _CALL, "self.l{i}.register_full_backward_hook(lambda m, gi, go: (gi[0] / (gi[0].norm() + 0.1),))"),
    Operation("gradient rolled, Function", "", "h = Rolled.apply(h)"),
    Operation("gradient of the batch's maximum", "", "h = h * 1.0\nif h.requires_grad:\n    h.register_hook(lambda g: torch.where(g.abs() == g.abs().max(), 5 * g, g))"),
)  # fmt: skip

LOSSES = {
    "cross entropy": "F.cross_entropy(outputs, labels, reduction='none')",
    "doubled": "2 * F.cross_entropy(outputs, labels, reduction='none')",
    "by label": "F.cross_entropy(outputs, labels, reduction='none') * torch.where(labels == 0, 3.0, 1.0)",
    "own parameter": "self.scale * F.cross_entropy(outputs, labels, reduction='none')",
    "holds the network": "F.cross_entropy(outputs, labels, reduction='none') + 0.1 * sum(p.square().sum() for p in self.held[0].parameters())",
    "any label (mixes)": "F.cross_entropy(outputs, labels, reduction='none') * (2.0 if (labels == 0).any() else 1.0)",
    "mean (mixes)": "F.cross_entropy(outputs, labels).expand(len(labels))",
    "normalised (mixes)": "(lambda v: v / (1 + v.detach().sum()))(F.cross_entropy(outputs, labels, reduction='none'))",
}  # fmt: skip
