grant_next(ARGV[1], judge(KEYS[5]))
return 1
