# FGD and IKD: adaptive crop or noise, and adversarial examples of the teacher made inside the step.
_base_ = "./fgd.py"
model = dict(
    adv=dict(beta=1e-5, attack=dict(type="OnlineDIFGSM", mode="single")),
    augment=dict(type="AdaptiveFreqAug", min_kept=0.4),
    stop_at=0.667,
)
