"""Types of the extension module; addresses are integers, type codes are `layout.TYPE_CODES`."""

PANEL: int

class Matrix:
    def __init__(
        self,
        *,
        num_rows: int,
        num_cols: int,
        grid: int,
        bits: int,
        draft_bits: int,
        group: int,
        type_code: int,
        q4: int = 0,
        r4: int = 0,
        r8: int = 0,
        scale: int = 0,
        offset: int = 0,
        dense: int = 0,
    ) -> None: ...

class Pools:
    def __init__(
        self,
        keys: int,
        values: int,
        type_code: int,
        num_slots: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
    ) -> None: ...

class RowTable:
    def __init__(
        self,
        positions: int,
        slots: int,
        cu_rows: int,
        block_tables: int,
        num_rows: int,
        num_spans: int,
        table_width: int,
    ) -> None: ...

class Step:
    def __init__(
        self,
        *,
        hidden: int,
        intermediate: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        vocabulary: int,
        eps: float,
        is_float: bool,
        hadamard: int,
        outliers: int,
        embedding: Matrix,
        final_norm: int,
        head: list[tuple[Matrix, int]],
        cos: int,
        sin: int,
        num_positions: int,
    ) -> None: ...
    def add_layer(
        self,
        *,
        input_norm: int,
        post_norm: int,
        q_norm: int,
        k_norm: int,
        qkv: list[tuple[Matrix, int]],
        output: list[tuple[Matrix, int]],
        gate_up: list[tuple[Matrix, int]],
        down: list[tuple[Matrix, int]],
    ) -> None: ...
    def set_cache(self, pools: list[Pools], /) -> None: ...
    def forward(
        self,
        tokens: int,
        rows: RowTable,
        is_draft: bool,
        activation: int,
        group: int,
        head_activation: int,
        logit_rows: int,
        num_logits: int,
        logits: int,
        /,
    ) -> None: ...

def available_isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str, /) -> None: ...
def num_threads() -> int: ...
def set_num_threads(num_threads: int, /) -> None: ...
def fork_join(times: int, /) -> None: ...
def barriers(times: int, /) -> None: ...
def read_memory(memory: int, size: int, /) -> int: ...
def embed(table: Matrix, tokens: int, num_rows: int, out: int, type_code: int, /) -> None: ...
def linear(
    weight: Matrix,
    is_draft: bool,
    activation: int,
    outliers: int,
    group: int,
    x: int,
    x_type: int,
    num_rows: int,
    bias: int,
    out: int,
    out_type: int,
    /,
) -> None: ...
def rms_norm(
    x: int,
    type_code: int,
    num_rows: int,
    stride: int,
    heads: int,
    size: int,
    weight: int,
    eps: float,
    out: int,
    /,
) -> None: ...
def rope(
    x: int,
    type_code: int,
    num_rows: int,
    stride: int,
    heads: int,
    size: int,
    cos: int,
    sin: int,
    out: int,
    /,
) -> None: ...
def hadamard(x: int, type_code: int, num_rows: int, size: int, order: int, out: int, /) -> None: ...
def write_kv(
    keys: int, key_stride: int, values: int, value_stride: int, type_code: int, to: Pools,
    rows: RowTable, /
) -> None: ...  # fmt: skip
def attention(
    query: int, type_code: int, num_heads: int, from_pools: Pools, rows: RowTable, out: int, /
) -> None: ...
def silu_mul(gate_up: int, type_code: int, num_rows: int, size: int, out: int, /) -> None: ...
