# Table 1, Mask R-CNN: FGD. Paper: 42.1 COCO val box AP.
_base_ = "../_base_/ikd_mask_rcnn.py"
model = dict(adv=None, augment=None, stop_at=None)
