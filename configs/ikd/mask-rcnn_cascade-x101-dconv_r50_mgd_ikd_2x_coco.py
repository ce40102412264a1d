# Table 1, Mask R-CNN: ours (+MGD). Paper: 42.5 COCO val box AP.
_base_ = "../_base_/ikd_mask_rcnn.py"
model = dict(losses=[dict(type="MGDLoss", preset="mask_rcnn", source="neck.fpn_convs.{i}.conv")])
