"""Counts read from compiled programs, against counts made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from early_exit.cost import programs

# As a TPU's compiler writes it, shortened: a loop of twelve turns over a fused product of matrices
# in a batch of four, and what the chips of a mesh of 2 × 4 exchange.
TPU = """
HloModule jit_step, is_scheduled=true

%fused.1 (a: bf16[4,16,32], b: bf16[4,32,8]) -> bf16[4,16,8] {
  %a = bf16[4,16,32]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[4,32,8]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %product = bf16[4,16,8]{2,1,0:T(8,128)(2,1)} convolution(%a, %b), window={size=4 stride=3 \
pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf, backend_config={"estimated_cycles":"5"}
}

%sum (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %add = bf16[] add(%x, %y)
}

%body (carry: (s32[], bf16[4,16,32], bf16[4,32,8], /*index=3*/bf16[4,16,8])) -> (s32[], \
bf16[4,16,32], bf16[4,32,8], /*index=3*/bf16[4,16,8]) {
  %carry = (s32[]{:T(128)}, bf16[4,16,32]{2,1,0}, bf16[4,32,8]{2,1,0}, bf16[4,16,8]) parameter(0)
  %turn = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %left = bf16[4,16,32]{2,1,0} get-tuple-element(%carry), index=1
  %right = bf16[4,32,8]{2,1,0} get-tuple-element(%carry), index=2
  %done = bf16[4,16,8]{2,1,0:T(8,128)(2,1)} fusion(%left, %right), kind=kOutput, \
calls=%fused.1, metadata={op_name="jit(step)/while/body/dot_general"}, \
backend_config={"window_config":{"estimated_cycles":"700"}}
  %reduced = bf16[4,16,8]{2,1,0} all-reduce(%done), channel_id=1, \
replica_groups=[2,4]<=[8], use_global_device_ids=true, to_apply=%sum, \
metadata={op_name="jit(step)/while/body/sum"}, backend_config={"estimated_cycles":"9"}
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%turn, %one)
  ROOT %all = (s32[], bf16[4,16,32], bf16[4,32,8], bf16[4,16,8]) tuple(%next, %left, %right, \
%reduced)
}

%goes_on (carry.1: (s32[], bf16[4,16,32], bf16[4,32,8], bf16[4,16,8])) -> pred[] {
  %carry.1 = (s32[], bf16[4,16,32]{2,1,0}, bf16[4,32,8]{2,1,0}, bf16[4,16,8]) parameter(0)
  %turn.1 = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  %turns = s32[]{:T(128)} constant(12)
  ROOT %less = pred[]{:T(512)} compare(%turn.1, %turns), direction=LT
}

ENTRY %main (p0: (s32[], bf16[4,16,32], bf16[4,32,8], bf16[4,16,8])) -> bf16[8,32,8] {
  %p0 = (s32[], bf16[4,16,32]{2,1,0}, bf16[4,32,8]{2,1,0}, bf16[4,16,8]) parameter(0)
  %loop = (s32[], bf16[4,16,32], bf16[4,32,8], bf16[4,16,8]) while(%p0), condition=%goes_on, \
body=%body
  %right.1 = bf16[4,32,8]{2,1,0} get-tuple-element(%loop), index=2
  %started = (bf16[4,32,8], bf16[8,32,8]) all-gather-start(%right.1), channel_id=2, \
replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}, use_global_device_ids=true
  ROOT %gathered = bf16[8,32,8]{2,1,0} all-gather-done(%started)
}
"""
MESH = {"data": 2, "tensor": 4}


def test_loops_fusions_and_collectives_of_a_tpu_program():
    read = programs.read(TPU.replace("\\\n", ""), MESH)
    product = 2 * 4 * 16 * 8 * 32  # the batch is a dilated window; its holes are no work
    assert (read.flops, read.open_loops) == (12 * product, 0)
    assert read.cycles == read.product_cycles == 12 * 700
    reduce, gather = read.collectives
    assert (reduce.kind, reduce.times, reduce.group, reduce.axes) == (
        "all-reduce", 12, 4, ("tensor",)
    )  # fmt: skip
    assert reduce.source == "jit(step)/while/body/sum"
    assert reduce.bytes == 12 * 4 * 16 * 8 * 2
    assert reduce.sent == pytest.approx(2 * 3 / 4 * reduce.bytes)
    assert (gather.kind, gather.group, gather.axes) == ("all-gather", 2, ("data",))
    assert gather.bytes == 8 * 32 * 8 * 2 and gather.sent == gather.bytes / 2


def test_a_loop_that_was_unrolled_turns_less_often():
    by_one = TPU.replace("\\\n", "")
    by_three = by_one.replace("constant(1)", "constant(3)")
    whole, unrolled = (programs.read(text, MESH) for text in (by_one, by_three))
    assert whole.flops == 3 * unrolled.flops > 0


def compiled(function, *args):
    return programs.read(jax.jit(function).lower(*args).compile().as_text(), {"data": 1})


# A collective that a TPU hides behind what is fused with parts of it: begun in front of a loop,
# under way in each of its turns, and done behind it. Another is fused and is sent at once.
CHAIN = """
HloModule jit_score, is_scheduled=true

%begins (p: bf16[8,32]) -> (bf16[8,32], bf16[16,32], u32[]) {
  %p = bf16[8,32]{1,0} parameter(0)
  %gather.1 = bf16[16,32]{1,0} all-gather(%p), channel_id=1, replica_groups=[4,2]<=[2,4]T(1,0), \
dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="0"}
  ROOT %begun = (bf16[8,32], bf16[16,32], u32[]) custom-call(%gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%goes_on_inside (q: bf16[8,32], r: bf16[8,32]) -> (bf16[8,32], bf16[16,32]) {
  %q = bf16[8,32]{1,0} parameter(0)
  %r = bf16[8,32]{1,0} parameter(1)
  %gather.2 = bf16[16,32]{1,0} all-gather(%q), channel_id=1, replica_groups=[4,2]<=[2,4]T(1,0), \
dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="0"}
  %negative = bf16[8,32]{1,0} negate(%r)
  ROOT %both = (bf16[8,32], bf16[16,32]) tuple(%negative, %gather.2)
}

%ends (s: bf16[8,32]) -> bf16[16,32] {
  %s = bf16[8,32]{1,0} parameter(0)
  %gather.3 = bf16[16,32]{1,0} all-gather(%s), channel_id=1, replica_groups=[4,2]<=[2,4]T(1,0), \
dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="0"}
  ROOT %ended = bf16[16,32]{1,0} custom-call(%s, %gather.3), \
custom_call_target="AsyncCollectiveDone"
}

%sum (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %add = bf16[] add(%x, %y)
}

%at_once (t: bf16[16,32]) -> bf16[4,32] {
  %t = bf16[16,32]{1,0} parameter(0)
  %reduced = bf16[16,32]{1,0} all-reduce(%t), channel_id=2, replica_groups=[2,4]<=[8], \
use_global_device_ids=true, to_apply=%sum
  ROOT %part = bf16[4,32]{1,0} slice(%reduced), slice={[0:4], [0:32]}
}

%body (carry: (s32[], bf16[8,32])) -> (s32[], bf16[8,32]) {
  %carry = (s32[], bf16[8,32]{1,0}) parameter(0)
  %turn = s32[] get-tuple-element(%carry), index=0
  %value = bf16[8,32]{1,0} get-tuple-element(%carry), index=1
  %under_way = (bf16[8,32], bf16[16,32]) fusion(%value, %value), kind=kCustom, \
calls=%goes_on_inside, backend_config={"estimated_cycles":"30"}
  %negated = bf16[8,32]{1,0} get-tuple-element(%under_way), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%turn, %one)
  ROOT %all = (s32[], bf16[8,32]) tuple(%next, %negated)
}

%goes_on (carry.1: (s32[], bf16[8,32])) -> pred[] {
  %carry.1 = (s32[], bf16[8,32]{1,0}) parameter(0)
  %turn.1 = s32[] get-tuple-element(%carry.1), index=0
  %turns = s32[] constant(64)
  ROOT %less = pred[] compare(%turn.1, %turns), direction=LT
}

ENTRY %main (p0: (s32[], bf16[8,32])) -> bf16[4,32] {
  %p0 = (s32[], bf16[8,32]{1,0}) parameter(0)
  %given = bf16[8,32]{1,0} get-tuple-element(%p0), index=1
  %start = (bf16[8,32], bf16[16,32], u32[]) fusion(%given), kind=kCustom, calls=%begins
  %loop = (s32[], bf16[8,32]) while(%p0), condition=%goes_on, body=%body
  %done = bf16[16,32]{1,0} fusion(%given), kind=kCustom, calls=%ends
  ROOT %scattered = bf16[4,32]{1,0} fusion(%done), kind=kCustom, calls=%at_once
}
"""


def test_what_is_under_way_while_a_loop_turns_is_sent_once():
    read = programs.read(CHAIN.replace("\\\n", ""), MESH)
    gather, reduce = read.collectives
    assert (gather.kind, gather.times, gather.axes) == ("all-gather", 1, ("data",))
    assert gather.bytes == 16 * 32 * 2
    assert (reduce.kind, reduce.times, reduce.axes) == ("all-reduce", 1, ("tensor",))
    assert (read.cycles, read.product_cycles) == (64 * 30, 0)


@pytest.mark.production
def test_products_in_nested_loops_and_branches_of_this_host():
    square = jnp.ones((16, 16))

    def inner(x, _):
        return jax.lax.dot(x, square) + 1, None

    def outer(x, _):
        return jax.lax.scan(inner, jnp.sin(x), None, length=3)[0], None

    def function(x, pick):
        x = jax.lax.scan(outer, x, None, length=5)[0]
        return jax.lax.switch(pick, [lambda x: x, lambda x: jax.lax.dot(x, square)], x)

    read = compiled(function, jnp.ones((8, 16)), 1)
    assert read.flops == (3 * 5 + 1) * 2 * 8 * 16 * 16
    assert (read.collectives, read.open_loops) == ((), 0)


@pytest.mark.production
def test_convolutions_count_what_is_not_padding():
    image, kernel = jnp.ones((1, 5, 5, 3)), jnp.ones((3, 3, 3, 7))
    read = compiled(
        lambda x: jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        image,
    )
    inside = np.array([2, 3, 3, 3, 2])  # taps of a window of three at each place of a row
    assert read.flops == 2 * 3 * 7 * np.outer(inside, inside).sum()


@pytest.mark.production
def test_a_loop_until_something_holds_is_counted_once_and_told():
    read = compiled(
        lambda x: jax.lax.while_loop(lambda x: x.sum() < 1e3, lambda x: x @ x, x), jnp.ones((4, 4))
    )
    assert (read.flops, read.open_loops) == (2 * 4**3, 1)
