from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import aot
from bench.aot import Job, check_fences, loop_cost, read_code, read_loops, read_usage, specs_of
from bench.compile import Outcome, select, update
from bench.paths import TABLE
from bench.table import Allowance, Limit, Row, Table, arch_of, compare

CLEAN = Row(
    registers=40, stack=0, local=0, shared_static=0, shared_dynamic=1024,
    spill_loads=0, spill_stores=0, mma="HGMMA",
)  # fmt: skip
KEY = "linear/linear_kernel/block=64/sm_90"


def changed(**fields) -> Row:
    return dataclasses.replace(CLEAN, **fields)


def check(
    row: Row, table: Table | None = None, limit: Limit | None = None
) -> tuple[list[str], list[str]]:
    table = table or Table("3.6.0", {KEY: CLEAN})
    limits = {KEY: limit} if limit is not None else None
    found = compare({KEY: row}, table, existing=[KEY], limits=limits)
    return found.failures, found.changes


def test_same_row_is_clean() -> None:
    assert check(CLEAN) == ([], [])


def test_other_registers_are_reported_and_do_not_fail() -> None:
    failures, changes = check(changed(registers=44))
    assert failures == []
    assert changes == [f"{KEY}: registers 40 -> 44"]


@pytest.mark.parametrize("fields", [{"stack": 16, "spill_stores": 4}, {"local": 8}])
def test_local_memory_fails_even_where_the_table_has_the_same(fields: dict) -> None:
    row = changed(**fields)
    failures, _ = check(row, Table("3.6.0", {KEY: row}))
    assert len(failures) == 1
    assert f"{row.spilled} bytes of local memory" in failures[0]


def test_allowance_covers_what_it_says_and_no_more() -> None:
    table = Table("3.6.0", {KEY: CLEAN}, {"linear/*/sm_90": Allowance(16, "a wide tile")})
    assert check(changed(stack=16), table)[0] == []
    assert "allowed 16" in check(changed(stack=24), table)[0][0]
    elsewhere = Table("3.6.0", {KEY: CLEAN}, {"linear/*/sm_80": Allowance(16, "a wide tile")})
    assert "allowed 0" in check(changed(stack=16), elsewhere)[0][0]


def test_allowance_needs_a_reason() -> None:
    table = Table("3.6.0", {KEY: CLEAN}, {KEY: Allowance(16, " ")})
    assert check(CLEAN, table)[0] == [f"allowed[{KEY!r}] gives no reason"]


def test_kernel_that_is_not_in_the_table_fails() -> None:
    assert "not in the table" in check(CLEAN, Table("3.6.0"))[0][0]


def test_row_without_a_kernel_fails() -> None:
    found = compare({}, Table("3.6.0", {KEY: CLEAN}), existing=[])
    assert "there is no such kernel" in found.failures[0]
    assert compare({}, Table("3.6.0", {KEY: CLEAN}), existing=[KEY]).failures == []


def test_lost_matrix_instructions_fail() -> None:
    assert "no matrix instruction" in check(changed(mma=""))[0][0]
    failures, changes = check(changed(mma="HMMA"))
    assert failures == []
    assert "HGMMA" in changes[0]


def test_more_shared_memory_than_the_chip_has_fails() -> None:
    assert check(changed(shared_dynamic=227 * 1024))[0] == []
    assert "shared memory" in check(changed(shared_dynamic=227 * 1024 + 1))[0][0]
    key = KEY.replace("sm_90", "sm_80")
    row = changed(shared_dynamic=163 * 1024 + 1)
    found = compare({key: row}, Table("3.6.0", {key: row}), existing=[key])
    assert "the chip has 166912" in found.failures[0]


def test_other_matrix_instructions_than_asked_for_fail_on_sm90() -> None:
    assert check(CLEAN, limit=Limit(mma="HGMMA"))[0] == []
    assert "are HGMMA, not QGMMA" in check(CLEAN, limit=Limit(mma="QGMMA"))[0][0]
    failures, _ = check(changed(mma=""), Table("3.6.0", {KEY: changed(mma="")}), Limit("HGMMA"))
    assert failures == [f"{KEY}: matrix instructions are none, not HGMMA"]
    key = KEY.replace("sm_90", "sm_80")
    rows = {key: changed(mma="HMMA", loop=9.0)}
    found = compare(rows, Table("3.6.0", rows), existing=[key], limits={key: Limit("HGMMA", 4.0)})
    assert found.failures == []  # the limits are those of sm_90


def test_slow_main_loop_fails() -> None:
    limit = Limit(max_loop=4.0)
    assert check(changed(loop=4.0), limit=limit)[0] == []
    failures, _ = check(changed(loop=4.01), limit=limit)
    assert failures == [f"{KEY}: 4.01 instructions per weight, at most 4.0"]
    assert len(check(changed(loop=None), limit=limit)[0]) == 1  # it was not counted
    assert check(changed(loop=9.0))[0] == []


def test_rows_without_a_loop_are_read(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    Table("3.6.0", {KEY: CLEAN}).save(path)
    path.write_text(path.read_text().replace(', "loop": null', ""))
    assert Table.load(path).kernels == {KEY: CLEAN}


def test_table_survives_a_round_trip(tmp_path: Path) -> None:
    table = Table("3.6.0", {KEY: CLEAN}, {"linear/*": Allowance(8, 'a "reason"')})
    path = tmp_path / "table.json"
    table.save(path)
    assert Table.load(path) == table
    Table("3.6.0").save(path)
    assert Table.load(path) == Table("3.6.0")
    assert Table.load(tmp_path / "absent.json") == Table()
    path.write_text('{"triton": "3.6.0", "kernels": {"a/sm_90": {"registers": 1}}}')
    with pytest.raises(ValueError, match="not a kernel table"):
        Table.load(path)


def test_shipped_table_is_readable_and_clean() -> None:
    table = Table.load(TABLE)
    assert table.kernels
    assert {arch_of(key) for key in table.kernels} == {80, 90, 100}
    assert compare(table.kernels, table, existing=table.kernels).failures == []


def jobs(*names: str) -> list[Job]:
    return [
        Job("op", index, arch, f"op/{name}/sm_{arch}", digest="")
        for arch in (80, 90, 100)
        for index, name in enumerate(names)
    ]


def test_short_matrix_has_all_of_sm90_and_the_last_of_each_kernel() -> None:
    everything = jobs("a/1", "a/2", "b/1")
    chosen = [job.key.removeprefix("op/") for job in select(everything)]
    assert chosen == [
        "a/2/sm_80", "b/1/sm_80", "a/1/sm_90", "a/2/sm_90", "b/1/sm_90", "a/2/sm_100", "b/1/sm_100",
    ]  # fmt: skip
    assert select(everything, full=True) == everything
    assert {job.arch for job in select(everything, archs=(80,))} == {80}
    assert len(select(everything, archs=(80,))) == 3
    quick = [job.key.removeprefix("op/") for job in select(everything, quick=True)]
    assert quick == [name for name in chosen if name != "a/1/sm_90"]
    assert [job.arch for job in select(everything, quick=True, archs=(90,))] == [90, 90]


def test_update_takes_new_rows_and_drops_stale_ones() -> None:
    allowed = {"op/*": Allowance(4, "why")}
    table = Table("3.5.0", {"op/old/sm_90": CLEAN, "op/kept/sm_90": CLEAN}, allowed)
    table.kernels |= {"broken/kernel/sm_90": CLEAN, "other/kernel/sm_90": CLEAN}
    outcome = Outcome(rows={"op/new/sm_90": CLEAN}, errors={"broken": "cannot be imported"})
    update(table, jobs("kept", "new"), outcome, ["op", "broken"])
    kept = {"op/kept/sm_90", "op/new/sm_90", "broken/kernel/sm_90"}
    assert set(table.kernels) == kept | {"other/kernel/sm_90"}  # it was not asked
    assert table.allowed == allowed
    update(table, jobs("kept", "new"), outcome, None)
    assert set(table.kernels) == kept


def test_resource_report_is_read() -> None:
    report = " Function k:\n  REG:45 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:584 TEXTURE:0\n"
    expected = {"registers": 45, "stack": 16, "local": 8, "shared_static": 1024}
    assert read_usage(report) == expected
    with pytest.raises(ValueError, match="LOCAL"):
        read_usage("REG:45 STACK:16 SHARED:0")


def test_machine_code_is_read() -> None:
    sass = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;  /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 LDL.64 R2, [R1+0x8] ;   /* 0x0000080001028983 */
        /*0020*/              @UP1 STL [R1], R3 ;
        /*0030*/                   STL.128 [R1+0x10], R4 ;
        /*0040*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0050*/                   UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR4] ;
    """
    assert read_code(sass) == {"spill_loads": 1, "spill_stores": 2, "mma": "HGMMA+UTCMMA"}
    with pytest.raises(ValueError, match="no instruction"):
        read_code("nothing to see")


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/               @P0 BRA 0x10 ;
        /*0030*/                   LDS R4, [R2] ;
        /*0040*/                   HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR4], R24 ;
        /*0050*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R3], R5 ;
        /*0060*/              @!P1 BRA 0xe0 ;
        /*0070*/                   ISETP.NE.AND P0, PT, R2, RZ, PT ;
        /*0080*/              @!P0 BRA 0x30 ;
        /*0090*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*00a0*/                   IADD3 R2, R2, 0x1, RZ ;
        /*00b0*/                   BRA.U UP2, 0x90 ;
        /*00c0*/               @P3 BRA 0x30 ;
        /*00d0*/                   EXIT ;
        /*00e0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R3], R5 ;
        /*00f0*/              @!P1 BRA 0xe0 ;
        /*0100*/                   BRA 0x70 ;
        /*0110*/                   BRA 0x110 ;
"""


def test_innermost_loops_with_matrix_instructions_are_found() -> None:
    """Not a loop without one (0x10), a loop around two (0x30 from 0xc0), the return from a wait
    (0x70 from 0x100)."""
    assert read_loops(SASS) == [6, 3]
    assert read_loops(SASS.replace("BRA 0x70 ;", "BRA 0x30 ;")) == [6, 3]
    assert read_loops(SASS.replace("HMMA", "FFMA")) == [6]
    assert read_loops("nothing to see") == []


def test_cost_of_a_loop_is_that_of_the_heaviest() -> None:
    assert loop_cost([600], (128 * 256,), 4) == 2.34
    assert loop_cost([423, 600], (128 * 128, 128 * 256), 4) == 3.3
    assert loop_cost([423, 600], (128 * 128, 128 * 256), 8) == 6.61
    with pytest.raises(ValueError, match="2 loops have matrix instructions"):
        loop_cost([423, 600], (128 * 256,), 4)


def test_specs_come_from_launch_where_an_op_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def module(name: str) -> SimpleNamespace:
        seen.append(name)
        return SimpleNamespace(aot_specs=list)

    monkeypatch.setattr(aot.importlib, "import_module", module)
    assert specs_of("expert_mlp") == specs_of("rms_norm") == []
    assert seen == ["tml_kernels.ops.expert_mlp.launch", "tml_kernels.ops.rms_norm.kernel"]


STORE, FENCE, BARRIER, WGMMA = (
    "st.shared.b16 [%r1], %rs1;\n",
    "fence.proxy.async.shared::cta;\n",
    "bar.sync 0;\n",
    "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {};\n",
)


@pytest.mark.parametrize(
    "ptx",
    [
        STORE + FENCE + BARRIER + WGMMA,
        STORE + BARRIER + FENCE + BARRIER + WGMMA,
        STORE + BARRIER + WGMMA,  # of something else: Triton asks for no fence
        STORE + BARRIER + STORE + FENCE + BARRIER + WGMMA + WGMMA,
        BARRIER + FENCE + WGMMA,
        STORE + BARRIER + FENCE,
    ],
)
def test_fences_before_the_barrier_are_fine(ptx: str) -> None:
    check_fences(ptx)


@pytest.mark.parametrize("store", [STORE, "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r1], {};\n"])
def test_fence_after_the_barrier_of_the_stores_is_refused(store: str) -> None:
    with pytest.raises(ValueError, match="after their barrier"):
        check_fences(STORE + FENCE + BARRIER + WGMMA + store + BARRIER + FENCE + WGMMA)


@pytest.mark.parametrize("kernel", ["gate_up_kernel", "down_kernel"])
@pytest.mark.parametrize("formats", ["int4", "int4+fp8"])
def test_four_programs_of_int4_experts_fit_on_an_h200(kernel: str, formats: str) -> None:
    """What their speed hangs on: 64 K registers and 228 KB, of which each program takes 1 KB more
    than it asks for."""
    row = Table.load(TABLE).kernels[f"expert_mlp/{kernel}/{formats},block_n=16/sm_90"]
    assert 4 * 128 * row.registers <= 65536
    assert 4 * (row.shared_dynamic + 1024) <= 228 * 1024
    assert row.spilled == 0
