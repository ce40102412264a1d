# Table 1, RetinaNet: the student alone, mmdet's own configuration. Paper: 37.4 COCO val box AP.
_base_ = "mmdet::retinanet/retinanet_r50_fpn_2x_coco.py"
