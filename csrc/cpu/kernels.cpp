// All CPU loops for one instruction set. CMake compiles this file once per instruction set, with
// its name as EMD_ISA and its flags. Do not include headers of torch or of the C++ library here:
// the linker keeps one copy of an inline function, possibly with instructions that the running
// machine lacks.
#include "kernels.h"

#include "kernels/group_norm.h"
#include "kernels/group_norm_backward.h"
#include "kernels/group_norm_channels_last.h"
#include "kernels/langevin_eps.h"
#include "kernels/langevin_z.h"
#include "kernels/m_step_loss.h"
#include "kernels/normal.h"
#include "kernels/perturb.h"
#include "kernels/score_matching_loss.h"
#include "kernels/uniform.h"
#include "kernels/winograd.h"

#define EMD_NAME_OF(isa) #isa
#define EMD_NAME(isa) EMD_NAME_OF(isa)

namespace emd::cpu::EMD_ISA {

extern const Kernels table;
const Kernels table = {
    EMD_NAME(EMD_ISA),
    uniform,
    normal,
    perturb,
    langevin_eps,
    langevin_z,
    m_step_loss,
    m_step_gradient,
    score_matching_loss,
    score_matching_gradient,
    group_norm,
    group_norm_moments,
    group_norm_maps,
    group_norm_apply,
    group_norm_backward,
    group_norm_backward_maps,
    group_norm_backward_sums,
    group_norm_backward_totals,
    group_norm_backward_apply,
    winograd_weight,
    winograd,
};

}  // namespace emd::cpu::EMD_ISA
