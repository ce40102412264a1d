# Table 1, Mask R-CNN: CWD. Paper: 41.2 COCO val box AP.
_base_ = "./mask-rcnn_cascade-x101-dconv_r50_cwd_ikd_2x_coco.py"
model = dict(adv=None, augment=None, stop_at=None)
