# Table 1, RepPoints: the student alone, mmdet's own configuration. Paper: 38.6 COCO val box AP.
_base_ = "mmdet::reppoints/reppoints-moment_r50_fpn-gn_head-gn_2x_coco.py"
