"""What is read of compiled programs' text, on excerpts of programs that XLA made for an H100 and a TPU v5e.

The excerpts are of real programs, shortened: names, types, calls and attributes as they were printed.
"""

import pytest

from diffusion.training.hlo import parse, size_of
from diffusion.training.program import Collective, Program, by_kind, group_size, heaviest

# Of the U-Net's step for an H100: a convolution with its workspace, a product, a reduction, a copy.
UNET = """HloModule jit_train_step, is_scheduled=true, entry_computation_layout={(f32[3,3,3,128]{3,2,1,0})->f32[]}

%region_0.15 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%fused_reduce (param_0.1: bf16[8,32,32,128]) -> f32[8,128] {
  %param_0.1 = bf16[8,32,32,128]{3,2,1,0} parameter(0)
  %convert.1 = f32[8,32,32,128]{3,2,1,0} convert(%param_0.1)
  %zero = f32[] constant(0)
  ROOT %reduce.1 = f32[8,128]{1,0} reduce(%convert.1, %zero), dimensions={1,2}, to_apply=%region_0.15
}

%gemm_fusion_dot.1_computation (p0: bf16[8,512], p1: bf16[512,128]) -> bf16[8,128] {
  %p0 = bf16[8,512]{1,0} parameter(0)
  %p1 = bf16[512,128]{1,0} parameter(1)
  ROOT %dot.1 = bf16[8,128]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (image: bf16[8,32,32,3], kernel: bf16[128,3,3,3], time: bf16[8,512], dense: bf16[512,128]) -> f32[8,128] {
  %image = bf16[8,32,32,3]{3,2,1,0} parameter(0), metadata={op_name="batch['image']"}
  %kernel = bf16[128,3,3,3]{3,2,1,0} parameter(1)
  %time = bf16[8,512]{1,0} parameter(2)
  %dense = bf16[512,128]{1,0} parameter(3)
  %conv = (bf16[8,32,32,128]{3,2,1,0}, u8[4096]{0}) custom-call(%image, %kernel), window={size=3x3 pad=1_1x1_1}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBiasActivationForward", \
metadata={op_name="jit(train_step)/jvp(UNet)/down_0_block_0/conv_1/conv_general_dilated"}
  %get = bf16[8,32,32,128]{3,2,1,0} get-tuple-element(%conv), index=0
  %gemm_fusion_dot.1 = bf16[8,128]{1,0} fusion(%time, %dense), kind=kCustom, calls=%gemm_fusion_dot.1_computation, \
metadata={op_name="jit(train_step)/jvp(UNet)/time_1/dot_general"}
  %copy.1 = bf16[8,128]{0,1} copy(%gemm_fusion_dot.1)
  ROOT %input_reduce_fusion = f32[8,128]{1,0} fusion(%get), kind=kInput, calls=%fused_reduce, \
metadata={op_name="jit(train_step)/jvp(UNet)/down_1_block_0/norm_1/reduce_sum"}
}
"""

# A loop over stacked weights, cut over four H100s: a weight is sliced and gathered, activations kept in place.
LOOP = """HloModule jit_f, is_scheduled=true

%fused_slice (p0: bf16[4,64,256], p1: s32[]) -> bf16[64,256] {
  %p0 = bf16[4,64,256]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,64,256]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,64,256}
  ROOT %bitcast.1 = bf16[64,256]{1,0} bitcast(%slice)
}

%fused_keep (q0: bf16[4,16,256], q1: bf16[16,256], q2: s32[]) -> bf16[4,16,256] {
  %q0 = bf16[4,16,256]{2,1,0} parameter(0)
  %q1 = bf16[16,256]{1,0} parameter(1)
  %bitcast.2 = bf16[1,16,256]{2,1,0} bitcast(%q1)
  %q2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %update = bf16[4,16,256]{2,1,0} dynamic-update-slice(%q0, %bitcast.2, %q2, %zero, %zero)
}

%body (arg: (s32[], bf16[16,256], bf16[4,16,256], bf16[4,64,256])) -> (s32[], bf16[16,256], bf16[4,16,256], \
bf16[4,64,256]) {
  %arg = (s32[], bf16[16,256]{1,0}, bf16[4,16,256]{2,1,0}, bf16[4,64,256]{2,1,0}) parameter(0)
  %turn = s32[] get-tuple-element(%arg), index=0
  %x = bf16[16,256]{1,0} get-tuple-element(%arg), index=1
  %kept = bf16[4,16,256]{2,1,0} get-tuple-element(%arg), index=2
  %weights = bf16[4,64,256]{2,1,0} get-tuple-element(%arg), index=3
  %own = bf16[64,256]{1,0} fusion(%weights, %turn), kind=kLoop, calls=%fused_slice
  %gather = (bf16[64,256]{1,0}, bf16[256,256]{1,0}) all-gather-start(%own), channel_id=1, \
replica_groups=mesh['axis_0'=4,'axis_1'=1] {'axis_0'}, dimensions={0}, use_global_device_ids=true
  %whole = bf16[256,256]{1,0} all-gather-done(%gather)
  %keep = bf16[4,16,256]{2,1,0} fusion(%kept, %x, %turn), kind=kLoop, calls=%fused_keep
  ROOT %next = (s32[], bf16[16,256]{1,0}, bf16[4,16,256]{2,1,0}, bf16[4,64,256]{2,1,0}) tuple(%turn, %x, %keep, \
%weights)
}

%condition (arg.1: (s32[], bf16[16,256], bf16[4,16,256], bf16[4,64,256])) -> pred[] {
  %end = s32[] constant(4)
  %arg.1 = (s32[], bf16[16,256]{1,0}, bf16[4,16,256]{2,1,0}, bf16[4,64,256]{2,1,0}) parameter(0)
  %turn.1 = s32[] get-tuple-element(%arg.1), index=0
  ROOT %lt = pred[] compare(%turn.1, %end), direction=LT
}

ENTRY %main (start: (s32[], bf16[16,256], bf16[4,16,256], bf16[4,64,256])) -> (s32[], bf16[16,256], bf16[4,16,256], \
bf16[4,64,256]) {
  %start = (s32[], bf16[16,256]{1,0}, bf16[4,16,256]{2,1,0}, bf16[4,64,256]{2,1,0}) parameter(0)
  ROOT %while.1 = (s32[], bf16[16,256]{1,0}, bf16[4,16,256]{2,1,0}, /*index=3*/bf16[4,64,256]{2,1,0}) \
while(%start), condition=%condition, body=%body, TRIPS
}
"""
KNOWN = 'backend_config={"known_trip_count":{"n":"4"},"known_init_step":{"init":"0","step":"1"}}'


def test_kernels_of_a_gpu_are_counted_with_what_they_read_and_write():
    found = by_kind(Program(UNET).kernels)
    image, result = 8 * 32 * 32 * 3 * 2, 8 * 32 * 32 * 128 * 2
    # The workspace, u8[4096], is no result.
    assert found["convolution"] == {"count": 1, "read": image + 128 * 27 * 2, "written": result}
    assert found["product"] == {"count": 1, "read": (8 * 512 + 512 * 128) * 2, "written": 8 * 128 * 2}
    assert found["reduction"] == {"count": 1, "read": result, "written": 8 * 128 * 4}
    assert found["copy"] == {"count": 1, "read": 8 * 128 * 2, "written": 8 * 128 * 2}
    assert next(iter(found)) == "convolution" and len(found) == 4


def test_layers_of_one_kind_are_named_together():
    names = [name for name, *_ in heaviest(Program(UNET).kernels, 2)]
    assert names[0].endswith("down_#_block_#/conv_#/conv_general_dilated") and len(names) == 2


@pytest.mark.parametrize("trips", [KNOWN, 'metadata={op_name="jit(f)/while"}'], ids=["stated", "from the condition"])
def test_a_loop_counts_as_often_as_it_turns_and_slices_and_updates_for_what_they_are(trips):
    program = Program(LOOP.replace("TRIPS", trips))
    assert program.open_loops == 0 and {one.times for one in program.kernels} == {4}
    own, gather, keep = program.kernels
    assert (own.read, own.written) == (64 * 256 * 2 + 4, 64 * 256 * 2)  # one of four weights, and its number
    assert (keep.read, keep.written) == (16 * 256 * 2 + 4, 16 * 256 * 2)  # the kept ones are not touched
    assert program.collectives == [Collective("all-gather", 256 * 256 * 2, 4, 4)] and gather.kind == "collective"


def test_a_loop_that_ends_at_an_unknown_turn_counts_once_and_is_reported():
    text = LOOP.replace("TRIPS", "metadata={}").replace("direction=LT", "direction=NE")
    program = Program(text)
    assert program.open_loops == 1 and {one.times for one in program.kernels} == {1}


def test_sizes_leave_out_a_tpus_vector_memory():
    assert size_of("(bf16[2,3]{1,0:T(8,128)(2,1)}, f32[]{:T(128)}, pred[5]{0}, s4[4]{0})") == 12 + 4 + 5 + 2
    assert size_of("bf16[16,256]{1,0:T(8,128)(2,1)S(1)}") == 0
    assert size_of("bf16[16,256]{1,0:T(8,128)(2,1)S(1)}", anywhere=True) == 8192
    assert size_of("token[]") == 0 and size_of("f8e4m3fn[8]") == 8


def test_types_with_tiles_and_comments_are_parsed():
    line = (
        "  %copy-start = (bf16[16,256]{1,0:T(8,128)(2,1)S(1)}, bf16[16,256]{1,0:T(8,128)(2,1)}, "
        "/*index=2*/u32[]{:S(2)}) copy-start(%param.5), backend_config={}"
    )
    computations, entry = parse("ENTRY %main.5_spmd (param.5: bf16[16,256]) -> () {\n" + line + "\n}\n")
    one = computations[entry].instructions["copy-start"]
    assert (entry, one.opcode, one.operands) == ("main.5_spmd", "copy-start", ("param.5",))


@pytest.mark.parametrize(
    "groups, size",
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", 8),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(1)2}", 2),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([8]) {'axis_1'}", 2),
        ("source_target_pairs={{0,1},{1,0}}", 2),
        ("", 1),
    ],
)
def test_groups_of_devices(groups, size):
    assert group_size(f"channel_id=1, {groups}, dimensions={{0}}") == size


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        Program("module @jit_f {\n}\n")
