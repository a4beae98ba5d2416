"""benchmarks.profile: the classes of kernels, time in which none ran, and a run on the CPU."""

import json

import pytest

from benchmarks import profile
from benchmarks.profile import Kernel

AT = "at::native::"
NAMES = {
    "convolution": (
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_warpgroupsize1x1x1_g1_"
        "execute_segment_k_off_kernel__5x_cudnn",
        "sm80_xmma_dgrad_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x32_stage4_warpsize2x2x1_g1_"
        "tensor16x8x16_kernel_cudnn",
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_128x64_32x6_nhwc_align8>"
        "(cutlass_tensorop_bf16_s16816fprop_optimized_bf16_128x64_32x6_nhwc_align8::Params)",
        "void cudnn::winograd_nonfused::winogradForwardData4x4<float, float>(...)",
    ),
    "GEMM": (
        "nvjet_tst_128x160_64x5_2x1_v_bz_coopA_TNT",
        "nvjet_sm90_tst_192x192_64x4_1x2_h_bz_coopB_NNN",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x64_64x4_tn_align8>(...)",
        "ampere_bf16_s1688gemm_bf16_128x64_sliced1x2_ldg8_f2f_tn",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_"
        "kernel__5x_cublas",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, true, false>(...)",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, 128, 16>(...)",
        "triton_tem_fused_addmm_3",
    ),
    "attention": (
        "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128, 64, 4, false, false, "
        "cutlass::bfloat16_t>>(pytorch_flash::Flash_fwd_params)",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>(pytorch_flash::Flash_bwd_params)",
        "void pytorch_flash::flash_bwd_dot_do_o_kernel<true, ...>(pytorch_flash::Flash_bwd_params)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_kernel0_0",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3_128x64x64_4x1x1_kernel0_0",
        "void cudnn::fusion::compute_dot_do_o_specialized<true, 128>(...)",
        "void cudnn::fusion::convert_dq_to_16bits<true, 64>(...)",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>::Params)",
        "attention_kernel",
        "attention_to_keys_kernel",
        f"void {AT}(anonymous namespace)::cunn_SoftMaxForward<8, float, float, float, ...>(float*, float const*, int)",
    ),
    "norm": (
        "group_norm_kernel",
        "group_norm_backward_apply_kernel",
        "group_moments_kernel",
        "void emd::cuda::(anonymous namespace)::resident_kernel<__nv_bfloat16>(emd::GroupNorm, emd::cuda::NormTile)",
        f"void {AT}(anonymous namespace)::vectorized_layer_norm_kernel<float, float, false>(int, float, ...)",
        f"void {AT}(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::BFloat16, float, long>(long, ...)",
        f"void {AT}(anonymous namespace)::ComputeFusedParamsCUDAKernel<c10::BFloat16, float>(...)",
        "triton_red_fused_native_group_norm_silu_4",
    ),
    "elementwise": (
        f"void {AT}vectorized_elementwise_kernel<4, {AT}BinaryFunctor<float, float, float, {AT}binary_internal::"
        "MulFunctor<float>>, std::array<char*, 3ul>>(int, ...)",
        f"void {AT}elementwise_kernel<128, 4, {AT}gpu_kernel_impl_nocast<{AT}CUDAFunctor_add<c10::BFloat16>>(...)>",
        f"void {AT}reduce_kernel<512, 1, {AT}ReduceOp<float, {AT}func_wrapper_t<float, {AT}sum_functor<...>>>>(...)",
        f"void {AT}vectorized_elementwise_kernel<8, {AT}FillFunctor<int>, std::array<char*, 1ul>>(int, ...)",
        f"void {AT}(anonymous namespace)::upsample_nearest2d_nhwc_out_frame<c10::BFloat16, &(...)>(...)",
        f"void {AT}(anonymous namespace)::avg_pool2d_out_cuda_frame_nhwc<c10::BFloat16, float>(...)",
        "triton_poi_fused_add_convolution_mul_silu_3",
        "langevin_eps_kernel",
        "perturb_kernel",
        "normal_kernel",
        "void emd::cuda::elements_kernel<emd::cuda::(anonymous namespace)::Body<true, false>>(...)",
        "void emd::cuda::parts_kernel<emd::MStepLoss>(emd::MStepLoss, float const*, unsigned int, float)",
        "geglu_backward_kernel",
        "residual_kernel",
    ),
    "copy": (
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        f"void {AT}elementwise_kernel<128, 4, {AT}gpu_kernel_impl_nocast<{AT}direct_copy_kernel_cuda(at::"
        "TensorIteratorBase&)::{lambda()#3}>(...)>",
        f"void {AT}vectorized_elementwise_kernel<4, {AT}bfloat16_copy_kernel_cuda(at::TensorIteratorBase&)::...>(...)",
        f"void {AT}(anonymous namespace)::CatArrayBatchedCopy_contig<{AT}(anonymous namespace)::OpaqueType<2u>, ...>",
        "void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float, false, true>(...)",
    ),
    "other": ("some_kernel_of_another_library",),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NAMES.items() for name in names])
def test_the_class_of_a_kernel(kind, name):
    assert profile.kind_of(name) == kind


def test_every_kernel_of_ours_has_a_class():
    triton = pytest.importorskip("triton")
    from emd_fast.backends import triton as ours

    for op in ours.OPS:
        module = ours.implementation(op).__globals__
        kernels = [name for name, value in module.items() if isinstance(value, triton.runtime.JITFunction)]
        assert all(profile.kind_of(name) != "other" for name in kernels if name.endswith("_kernel")), kernels


def test_gaps_are_the_time_in_which_no_kernel_ran():
    kernels = [
        Kernel("nvjet_a", 10.0, 14.0),
        Kernel("sm90_xmma_fprop_x", 12.0, 20.0),  # on another stream
        Kernel("Memset (Device)", 13.0, 13.5),
        Kernel("normal_kernel", 23.0, 24.0),
        Kernel("normal_kernel", 25.0, 27.0),
    ]
    found = profile.summary(kernels[::-1])
    expected = {"GEMM": 4.0, "convolution": 8.0, "copy": 0.5, "elementwise": 3.0, "attention": 0.0, "norm": 0.0}
    assert found == expected | {"other": 0.0, "gaps": 4.0, "whole": 17.0, "launches": 5.0}
    assert profile.largest(kernels, 2) == [
        ("convolution", "sm90_xmma_fprop_x", 1, 8.0),
        ("GEMM", "nvjet_a", 1, 4.0),
    ]
    assert profile.summary([])["whole"] == 0.0


def test_a_run_on_the_cpu(tmp_path, capsys):
    file = tmp_path / "profile.json"
    assert profile.main(["small", "--batch", "2", "--device", "cpu", "--json", str(file)]) == 0
    said, facts = capsys.readouterr().out, json.loads(file.read_text())
    assert "E-step of small, batch 2, K = 1" in said and "convolution" in said and "gaps" in said
    times = facts["microseconds"]
    assert all(times[kind] > 0 for kind in ("convolution", "GEMM", "norm", "elementwise", "copy"))
    assert facts["batch"] == 2 and sum(count for _, _, count, _ in facts["kernels"]) == times["launches"]


def test_without_a_gpu_it_says_so(capsys):
    assert profile.main(["small", "--device", "tpu"]) == 2
    assert "profile: --device must be" in capsys.readouterr().err
