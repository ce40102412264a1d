# RetinaNet: FKD and IKD; no published run. FKD's numbers are the authors' for one-stage detectors; Table 1 does not say its own.
_base_ = "../_base_/ikd_retinanet.py"
model = dict(
    losses=[dict(type="FKDLoss", preset="retinanet", source="neck.fpn_convs.{i}.conv")],
    init_student=False,
)
