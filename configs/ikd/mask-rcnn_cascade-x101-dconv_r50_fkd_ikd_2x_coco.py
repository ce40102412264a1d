# Mask R-CNN: FKD and IKD; no published run. FKD's numbers are the authors' for two-stage detectors; Table 1 does not say its own.
_base_ = "../_base_/ikd_mask_rcnn.py"
model = dict(losses=[dict(type="FKDLoss", preset="mask_rcnn", source="neck.fpn_convs.{i}.conv")])
