# RetinaNet: CWD and IKD; no published run. CWD's numbers, levels and tap are mmdetection-distiller's of this pair; the student
# starts from its own neck and head, as there.
_base_ = "../_base_/ikd_retinanet.py"
model = dict(
    losses=[dict(type="CWDLoss", preset="retinanet", source="neck.fpn_convs.{i}.conv")],
    init_student=False,
)
