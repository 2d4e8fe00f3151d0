"""Contact graphs of agents."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrobirds import _checks
from pyrobirds._checks import shape_text


class Graph:
    r"""Who meets whom: a directed graph of agents, kept for fast sums over neighbours.

    An edge from u to v lets u act on v. With :math:`m_{uv}` the number of edges from u to v,

    .. math:: (\mathrm{neighbour\_sum}\, x)_v = \sum_u m_{uv} x_u.

    The sum is one product with a sparse matrix (compressed rows, 32-bit indices). Its transpose is held for the
    backward pass, unless the graph is undirected and so its own transpose. A complete graph, where everybody meets
    everybody, is recognised and has no matrix. Conversion sorts the edges and costs up to a hundred sums, more from
    networkx: make a Graph once, not in every call.

    Args:
        graph: a networkx graph of any kind, whose nodes are numbered in its own order, or the edges as an integer
            tensor of shape ``(2, n_edges)``, sources in row 0 and targets in row 1, as in PyTorch Geometric. An edge of
            an undirected networkx graph acts both ways. Parallel edges count as several contacts; weights and other
            attributes are not looked at. A Graph gives a copy.
        n_agents: number of agents if ``graph`` is a tensor; by default its largest entry plus 1. Agents without edges
            are allowed.
        undirected: with a tensor, that each edge is given once and acts both ways.

    Raises:
        TypeError, ValueError: ``graph`` is none of these or has no agents, an edge names an agent that is not
            there or joins an agent to itself, an edge of an undirected graph is given in both directions, or an
            argument is given that belongs to a tensor alone.

    Example:
        >>> chain = Graph(torch.tensor([[0, 1], [1, 2]]))
        >>> chain
        Graph(n_agents=3, n_edges=2)
        >>> chain.neighbour_sum(torch.tensor([[1.0], [10.0], [100.0]])).flatten()
        tensor([ 0.,  1., 10.])
        >>> Graph.complete(3).neighbour_sum(torch.tensor([[1.0], [10.0], [100.0]])).flatten()
        tensor([110., 101.,  11.])
    """

    def __init__(self, graph: Any, n_agents: int | None = None, *, undirected: bool = False) -> None:
        if isinstance(graph, Tensor):
            edges, self.n_agents = _from_tensor(graph, n_agents, _checks.boolean("undirected", undirected))
        else:
            if n_agents is not None or undirected is not False:
                raise TypeError("n_agents and undirected belong to a tensor of edges: a networkx graph knows its own")
            if isinstance(graph, Graph):
                self.__dict__.update(graph.__getstate__())
                return
            edges, self.n_agents = _from_networkx(graph)
        _refuse_loops(edges)
        self.n_edges = edges.shape[1]
        self._set_matrices(edges)

    @classmethod
    def complete(cls, n_agents: int) -> Graph:
        """The graph in which everybody meets everybody else, without a matrix: a sum over neighbours is a total.

        Args:
            n_agents: number of agents.

        Raises:
            TypeError, ValueError: ``n_agents`` is not a whole number of at least 1.
        """
        graph = cls.__new__(cls)
        graph.n_agents = _checks.positive_int("n_agents", n_agents)
        graph.n_edges = graph.n_agents * (graph.n_agents - 1)
        graph._set_complete()
        return graph

    @property
    def is_complete(self) -> bool:
        """Whether everybody meets everybody else exactly once."""
        return not self._rows

    def neighbour_sum(self, x: Tensor) -> Tensor:
        """Sum over the agents that act on each agent; differentiable in both modes, and vmap takes it.

        Args:
            x: shape ``(n_agents, n_columns)``, float32 or float64; any device, to which the matrix is copied once.

        Raises:
            ValueError: ``x`` has another shape.
        """
        if x.dim() != 2 or x.shape[0] != self.n_agents:
            raise ValueError(
                f"x has shape {shape_text(x.shape)}, expected ({self.n_agents}, n_columns): one row for each agent"
            )
        return _sum(x, self, False)

    def add_sum(self, total: Tensor, x: Tensor, *, transposed: bool = False) -> Tensor:
        """Add the sum over neighbours to ``total`` in place, without a record for autograd.

        Inside of torch's transforms, such as :func:`torch.func.grad`, only a node of autograd can call it.

        Args:
            total: shape ``(n_agents, n_columns)``.
            x: in the shape, dtype and on the device of ``total``, as for :meth:`neighbour_sum`.
            transposed: whether edges act backwards, as gradients do.
        """
        if self.is_complete:
            return total.add_(x.sum(0)).sub_(x)
        return total.addmm_(self._matrix(transposed, x), x.contiguous())

    def __repr__(self) -> str:
        return f"Graph(n_agents={self.n_agents}, n_edges={self.n_edges})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_matrices": {}}  # sparse matrices are made anew where they are needed

    def _set_matrices(self, edges: Tensor) -> None:
        sources, targets = edges
        n = self.n_agents
        pairs = n * targets + sources
        if self.n_edges == n * (n - 1) and len(pairs.unique()) == self.n_edges:
            self._set_complete()
            return
        rows = _compress(pairs, n)
        transposed = _compress(n * sources + targets, n)
        undirected = all(torch.equal(a, b) for a, b in zip(rows, transposed, strict=True))
        self._rows = (rows, rows if undirected else transposed)
        self._matrices: dict[Any, Tensor] = {}
        self.max_in_degree = int(rows.starts.diff().max())

    def _set_complete(self) -> None:
        self._rows = ()
        self._matrices = {}
        self.max_in_degree = self.n_agents - 1

    def _matrix(self, transposed: bool, like: Tensor) -> Tensor:
        rows = self._rows[transposed]
        key = (id(rows), like.dtype, like.device)
        if key not in self._matrices:
            self._matrices[key] = rows.matrix(like)
        return self._matrices[key]


class _Rows(NamedTuple):
    """A square matrix of numbers of edges in compressed rows."""

    starts: Tensor
    columns: Tensor

    def matrix(self, like: Tensor) -> Tensor:
        n = len(self.starts) - 1
        starts, columns = self.starts.to(like.device), self.columns.to(like.device)
        values = torch.ones(len(columns), dtype=like.dtype, device=like.device)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state", UserWarning)
            return torch.sparse_csr_tensor(starts, columns, values, (n, n), check_invariants=False)


class _NeighbourSum(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, graph: Graph, transposed: bool) -> Tensor:
        return graph.add_sum(torch.zeros_like(x, memory_format=torch.contiguous_format), x, transposed=transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Graph, bool], output: Tensor) -> None:
        _, ctx.graph, ctx.transposed = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _sum(grad, ctx.graph, not ctx.transposed), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:  # type: ignore[override]
        return _sum(tangent, ctx.graph, ctx.transposed)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, graph: Graph, transposed: bool) -> tuple[Tensor, int]:  # type: ignore[override]
        x = x.movedim(in_dims[0], -1)
        return _sum(x.flatten(1), graph, transposed).reshape(x.shape), 2


def _sum(x: Tensor, graph: Graph, transposed: bool) -> Tensor:
    return _NeighbourSum.apply(x, graph, transposed)


def _compress(keys: Tensor, n: int) -> _Rows:
    """The matrix with an entry at row ``key // n`` and column ``key % n`` for each of the keys."""
    keys = keys.sort().values
    dtype = torch.int32 if len(keys) < 2**31 else torch.int64
    starts = torch.searchsorted(keys, n * torch.arange(n + 1))
    return _Rows(starts.to(dtype), keys.remainder(n).to(dtype))


def _from_tensor(edges: Tensor, n_agents: int | None, undirected: bool) -> tuple[Tensor, int]:
    if edges.layout != torch.strided:
        raise TypeError(
            f"graph must be a dense tensor of edges, got one of {edges.layout}: of a sparse matrix of contacts take "
            "graph.to_sparse_coo().coalesce().indices()"
        )
    if edges.is_floating_point() or edges.is_complex() or edges.dtype == torch.bool:
        raise TypeError(f"graph must hold the numbers of agents as integers, got {edges.dtype}: use graph.long()")
    if edges.dim() != 2 or edges.shape[0] != 2:
        raise ValueError(
            f"graph has shape {shape_text(edges.shape)}, expected (2, n_edges), sources in row 0 and targets in row 1: "
            "a list of pairs needs .T, a matrix of contacts .nonzero().T"
        )
    edges = edges.detach().long().cpu()
    if n_agents is None:
        if not edges.numel():
            raise ValueError("graph has no edges, so that nothing says how many agents there are: pass n_agents")
        n_agents = int(edges.max()) + 1
    n_agents = _checks.positive_int("n_agents", n_agents)
    wrong = edges[(edges < 0) | (edges >= n_agents)]
    if len(wrong):
        raise ValueError(
            f"graph names agent {int(wrong[0])}, but there are {n_agents} agents, 0 to {n_agents - 1}: number them "
            "from 0, or pass a larger n_agents"
        )
    if undirected:
        there, back = n_agents * edges[0] + edges[1], n_agents * edges[1] + edges[0]
        twice = edges[:, torch.isin(there, back) & (there != back)]
        if twice.numel():
            raise ValueError(
                f"graph holds an edge from {int(twice[0, 0])} to {int(twice[1, 0])} and one back, and undirected=True "
                "would count both twice: give each edge once, or leave undirected out"
            )
        edges = torch.cat([edges, edges.flip(0)], 1)
    return edges, n_agents


def _from_networkx(graph: Any) -> tuple[Tensor, int]:
    if not all(hasattr(graph, name) for name in ("nodes", "edges", "is_directed")):
        remedy = ": pass torch.from_numpy(graph)" if type(graph).__module__ == "numpy" else ""
        raise TypeError(
            "graph must be a pyrobirds Graph, a networkx graph, or an integer tensor of edges of shape (2, n_edges), "
            f"got a {type(graph).__name__}{remedy}"
        )
    numbers = {label: number for number, label in enumerate(graph.nodes)}
    if not numbers:
        raise ValueError("graph has no agents: add nodes to it")
    edges = _numbered(graph.edges(), numbers)
    if not graph.is_directed():
        _refuse_loops(edges)
        edges = torch.cat([edges, edges.flip(0)], 1)
    return edges, len(numbers)


def _numbered(edges: Iterable[Any], numbers: dict[Any, int]) -> Tensor:
    pairs = [(numbers[source], numbers[target]) for source, target in edges]
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T


def _refuse_loops(edges: Tensor) -> None:
    loops = edges[0][edges[0] == edges[1]]
    if len(loops):
        raise ValueError(
            f"graph joins agent {int(loops[0])} to itself, which no contact does: leave such edges out, for networkx "
            "by graph.remove_edges_from(list(networkx.selfloop_edges(graph)))"
        )
