# FGD and IKD: adaptive crop or noise, and adversarial examples of the teacher made inside the step.
_base_ = "./student.py"
model = dict(
    _delete_=True,
    type="IKDDistiller",
    student=_base_.model,
    teacher_config="ikd_fast::demo/teacher.py",
    teacher_ckpt="ikd_fast::demo_teacher.safetensors",
    losses=[dict(type="FGDLoss", preset="retinanet")],
    adv=dict(beta=1e-5, attack=dict(type="OnlineDIFGSM", mode="single")),
    augment=dict(type="AdaptiveFreqAug", min_kept=0.4),
    stop_at=0.667,
)
