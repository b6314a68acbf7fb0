//! Example programs; see the files beside this one's folder.
