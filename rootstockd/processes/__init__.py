"""A worker as a process: started, talked to, listened to, ended."""
