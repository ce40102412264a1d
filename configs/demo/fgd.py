# The student distilled with FGD: the clean features of the teacher.
_base_ = "./student.py"
model = dict(
    _delete_=True,
    type="IKDDistiller",
    student=_base_.model,
    teacher_config="ikd_fast::demo/teacher.py",
    teacher_ckpt="ikd_fast::demo_teacher.safetensors",
    losses=[dict(type="FGDLoss", preset="retinanet")],
)
