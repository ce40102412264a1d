# RepPoints: CWD and IKD; no published run. CWD's numbers are those published for RetinaNet: none is published for RepPoints, and
# Table 1 does not say its own.
_base_ = "../_base_/ikd_reppoints.py"
model = dict(
    losses=[dict(type="CWDLoss", preset="retinanet", source="neck.fpn_convs.{i}.conv")],
    init_student=False,
)
