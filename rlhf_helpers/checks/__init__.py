"""The exercise checks: each runs the learner's function and names the likely mistake."""

from rlhf_helpers.checks.diagnosis import FAULTS, check_diagnosis, training_log
from rlhf_helpers.checks.lesson_01 import (
    check_lora_forward,
    check_lora_parameters,
    check_mask_prompt,
    check_nf4_bytes,
)
from rlhf_helpers.checks.lesson_02 import (
    check_last_token_index,
    check_pair_accuracy,
    check_pairwise_loss,
)
from rlhf_helpers.checks.lesson_03 import check_gae, check_policy_loss, check_token_logprobs
from rlhf_helpers.checks.lesson_04 import check_predict_bytes, check_shape_rewards, check_train_step
from rlhf_helpers.checks.lesson_05 import (
    check_estimate_kl,
    check_exact_kl,
    check_final_reward,
    check_sampled_log_probs,
)
from rlhf_helpers.checks.lesson_06 import check_mixture, check_most_unsure, check_self_agreement
from rlhf_helpers.checks.lesson_07 import ILLNESSES, check_mended, check_patients, patient
from rlhf_helpers.checks.lesson_08 import (
    ORIGINS,
    check_dpo_loss,
    check_implicit_rewards,
    check_origins,
    dpo_log,
)
from rlhf_helpers.checks.lesson_09 import (
    check_grpo_advantages,
    check_k3_penalty,
    check_leave_one_out,
    check_teaching_share,
)
from rlhf_helpers.checks.lesson_10 import (
    check_rank_bytes,
    check_sent_bytes,
    check_split_logprobs,
    check_whiten_over_ranks,
)

__all__ = [
    "FAULTS",
    "ILLNESSES",
    "ORIGINS",
    "check_diagnosis",
    "check_dpo_loss",
    "check_estimate_kl",
    "check_exact_kl",
    "check_final_reward",
    "check_gae",
    "check_grpo_advantages",
    "check_implicit_rewards",
    "check_k3_penalty",
    "check_last_token_index",
    "check_leave_one_out",
    "check_lora_forward",
    "check_lora_parameters",
    "check_mask_prompt",
    "check_mended",
    "check_mixture",
    "check_most_unsure",
    "check_nf4_bytes",
    "check_origins",
    "check_pair_accuracy",
    "check_pairwise_loss",
    "check_patients",
    "check_policy_loss",
    "check_predict_bytes",
    "check_rank_bytes",
    "check_sampled_log_probs",
    "check_self_agreement",
    "check_sent_bytes",
    "check_shape_rewards",
    "check_split_logprobs",
    "check_teaching_share",
    "check_token_logprobs",
    "check_train_step",
    "check_whiten_over_ranks",
    "dpo_log",
    "patient",
    "training_log",
]
