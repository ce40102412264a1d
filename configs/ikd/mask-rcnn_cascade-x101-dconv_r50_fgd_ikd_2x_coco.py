# Table 1, Mask R-CNN: ours (+FGD). Paper: 42.4 COCO val box AP.
_base_ = "../_base_/ikd_mask_rcnn.py"
