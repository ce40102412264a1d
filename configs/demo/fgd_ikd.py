# FGD and IKD: adaptive crop or noise, and adversarial examples of the teacher made inside the step.
_base_ = "./fgd.py"
model = dict(
    adv=dict(beta=1e-5, attack=dict(type="OnlineDIFGSM", mode="carry")),
    augment=dict(type="AdaptiveFreqAug", min_kept=0.4, crop_align=8),
    stop_at=0.667,
)
