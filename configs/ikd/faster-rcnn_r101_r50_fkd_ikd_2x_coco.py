# Faster R-CNN: FKD and IKD; no published run. FKD's numbers, levels and tap are mmrazor's of this pair, which are the authors'
# for two-stage detectors.
_base_ = "../_base_/ikd_faster_rcnn.py"
model = dict(losses=[dict(type="FKDLoss", preset="faster_rcnn", source="neck.fpn_convs.{i}.conv")])
