# Table 1, Mask R-CNN: the student alone, mmdet's own configuration. Paper: 39.2 COCO val box AP.
_base_ = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_2x_coco.py"
